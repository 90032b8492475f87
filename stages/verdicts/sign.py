"""Plain verdicts on a run: each sign with its value, its threshold and the remedy. Warnings never stop a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """One checked sign; `good` is None where it could not be measured on this machine."""

    name: str
    good: bool | None
    finding: str
    remedy: str


@dataclass(frozen=True)
class Verdicts:
    signs: list[Sign]

    @property
    def text(self) -> str:
        """One line a sign; remedies only where something is wrong."""
        lines = []
        for sign in self.signs:
            mark = {True: "good", False: "BAD ", None: "n/a "}[sign.good]
            lines.append(f"{mark}  {sign.finding}" + (f"  ->  {sign.remedy}" if sign.good is False else ""))
        return "\n".join(lines)

    @property
    def tags(self) -> dict[str, str]:
        return {f"sign.{sign.name}": {True: "good", False: "bad", None: "n/a"}[sign.good] for sign in self.signs}
