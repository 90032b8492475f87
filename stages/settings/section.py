"""What every section of params.yaml is made of: no key more or less than these, and types of numbers, names and paths."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
# One path or several; YAML may hold a text or a list.
Names = Annotated[
    list[Name], BeforeValidator(lambda names: [names] if isinstance(names, str | int) else names), Field(min_length=1)
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
