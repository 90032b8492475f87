"""data: where questions and passages come from and how they are read."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.settings.section import Name, Names, Positive, Section, Share


class Sample(Section):
    passages: Annotated[int, Field(ge=50)]
    train_questions: Positive
    validation_questions: Positive
    test_questions: Positive


class Files(Section):
    train: Names | None
    validation: Names | None
    test: Names | None
    passages: Names | None


class Qrels(Section):
    train: Names | None
    validation: Names | None
    test: Names | None


class Tables(Section):
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None
    question_columns: Annotated[list[Name], Field(min_length=1)] | None
    passage_columns: Annotated[list[Name], Field(min_length=1)] | None
    quoting: bool | None
    separator: Name | None


class Fields(Section):
    question: Name
    answers: Name | None
    id: Name
    positive_ids: Name
    passage_id: Name
    title: Name
    text: Name | None


class Shares(Section):
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]


class Positives(Section):
    depth: Annotated[int, Field(ge=0, le=1000)]
    questions: Positive | None


class Nq(Section):
    questions: Name
    questions_revision: Name
    train_files: Name
    test_files: Name
    passages: Name
    passages_revision: Name
    passage_files: Name


class Data(Section):
    source: Literal["sample", "files", "nq"]
    # YAML 1.1 reads Norwegian's code as false.
    language: Annotated[
        str, BeforeValidator(lambda code: "no" if code is False else code), Field(pattern="^[a-z]{2,3}$")
    ]
    sample: Sample
    files: Files
    qrels: Qrels
    tables: Tables
    fields: Fields
    unanswerable: Name | None
    answers_are: Literal["text", "regex"]
    shares: Shares
    positives: Positives
    max_unusable: Share
    nq: Nq

    @model_validator(mode="after")
    def _files_are_named(self) -> "Data":
        if self.source == "files":
            for split in ("train", "passages"):
                if getattr(self.files, split) is None:
                    raise ValueError(f"data.files.{split}: missing; data.source: files needs its path")
            for split, name in self.qrels.model_dump().items():
                if name and not getattr(self.files, split):
                    raise ValueError(
                        f"data.qrels.{split}: {', '.join(name)}, but data.files.{split} names no questions"
                    )
            if self.shares.validation + self.shares.test >= 1:
                raise ValueError("data.shares: validation and test together must leave something to train on")
        return self
