"""Plays the transcripts in `tests/scenarios` on a grant table. Each is documentation: what happens, and who computes.

# PROSE
arbiter SETTINGS                             a new unit with these settings of the arbiter
worker NAME SHARE%                           NAME is MODEL.ROLE, and /2 and so on for further ones
NAME waits [class N] [due in N ms] [lost in N ms] [request N]
                                             it has work: of a priority class, with a latency target, which is missed
                                             when it is due or, where it may catch up, later; of requests of which the
                                             oldest arrived N seconds after the start
NAME ends its step [of N ms] [...]           has more work, and returns its grant if it is recalled; N ms have passed
each ends its step                           all that compute, at once
NAME has no more work                        returns its grant
NAME returns its grant late                  a revoked one; it has more work
NAME exits                                   its process
N ms pass, N s pass                          no worker ends a step
=> ...                                       how it is now, after kvstore has seen all that is above
"""

import re
from pathlib import Path

import pytest
import yaml

from kvstore.grant_page import Word
from kvstore.grant_table import GrantTable
from muxmesh.clock import ManualClock
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.types import Role

FOLDER = Path(__file__).parents[1] / "scenarios"
CHECK_EVERY_S = 0.5
_DETAIL = re.compile(
    r"(?:class (?P<priority>-?\d+)|due in (?P<due_ms>-?\d+) ms|lost in (?P<lost_ms>-?\d+) ms"
    r"|request (?P<arrived_s>\d+))$"
)


class Story:
    """A unit whose workers do what a transcript says."""

    def __init__(self, settings: str) -> None:
        self.clock = ManualClock(1000.0)
        config = ArbiterConfig.model_validate(yaml.safe_load(f"{{{settings}}}"))
        self.table = GrantTable(
            config.resolved(is_cuda=False, uses_mps=False, has_limits=True, has_slos=False, num_models=2), self.clock
        )
        self.slots: dict[str, int] = {}
        self.to_kill: list[str] = []

    def close(self) -> None:
        self.table.close()

    def add_worker(self, name: str, share: str) -> None:
        model, _, role = name.partition("/")[0].partition(".")
        self.slots[name], _ = self.table.allocate_slot(Role(role), model, int(share.rstrip("%")) / 100)

    def play(self, line: str) -> None:
        """One line that is neither prose, nor the start of a story, nor its state."""
        event, *details = (part.strip() for part in re.split(r"\s*,\s*|\s+(?=class |due in |lost in |request )", line))
        if match := re.fullmatch(r"worker (\S+) (\d+%)", event):
            self.add_worker(*match.groups())
        elif match := re.fullmatch(r"([\d.]+) (ms|s) pass", event):
            self.pass_time(float(match[1]) / (1000 if match[2] == "ms" else 1))
        elif event == "each ends its step":
            for name in self.computing():
                self.end_step(self.slots[name])
        else:
            name, _, verb = event.partition(" ")
            if match := re.fullmatch(r"(ends its step) of (\d+) ms", verb):
                verb = match[1]
                self.clock.advance(int(match[2]) / 1000)
                self.table.page.add(self.slots[name], Word.BUSY_NS, int(match[2]) * 1_000_000)
            self.describe(self.slots[name], details)
            self.act(name, verb)

    def act(self, name: str, verb: str) -> None:
        slot, page = self.slots[name], self.table.page
        if verb == "waits":
            page.write(slot, Word.DEMAND, 1)
        elif verb == "ends its step":
            self.end_step(slot)
        elif verb in {"has no more work", "returns its grant late"}:
            page.write(slot, Word.DEMAND, int(verb == "returns its grant late"))
            page.write(slot, Word.GRANTED_STEPS, 0)
        elif verb == "exits":
            del self.slots[name]
            self.table.free_slot(slot)
        else:
            raise ValueError(f"no event: {name} {verb}")

    def end_step(self, slot: int) -> None:
        self.table.page.add(slot, Word.BUSY_NS, 1)
        if self.table.page.read(slot, Word.RECALLED):
            self.table.page.write(slot, Word.DEMAND, 1)
            self.table.page.write(slot, Word.GRANTED_STEPS, 0)

    def describe(self, slot: int, details: list[str]) -> None:
        for detail in details:
            match = _DETAIL.match(detail)
            assert match, f"no detail: {detail}"
            if match["priority"]:
                self.table.page.write(slot, Word.PRIORITY, int(match["priority"]))
            elif match["due_ms"]:
                for word in (Word.DUE_US, Word.LOST_US):
                    self.table.page.write(slot, word, self.us_in(match["due_ms"]))
            elif match["lost_ms"]:
                self.table.page.write(slot, Word.LOST_US, self.us_in(match["lost_ms"]))
            else:
                self.table.page.write(slot, Word.ARRIVED_US, int(match["arrived_s"]) * 1_000_000)

    def us_in(self, milliseconds: str) -> int:
        return int((self.clock.monotonic_s() + int(milliseconds) / 1000) * 1e6)

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        names = {slot: name for name, slot in self.slots.items()}
        for _ in range(int(seconds / CHECK_EVERY_S)):
            for slot in self.table.revoke_stalled(CHECK_EVERY_S).to_kill:
                if names[slot] not in self.to_kill:
                    self.to_kill.append(names[slot])

    def computing(self) -> list[str]:
        return [name for name, slot in self.slots.items() if self.table.page.read(slot, Word.GRANTED_STEPS)]

    def state(self) -> str:
        """Who computes, and who waits, as transcripts have it. The arbiter decides first."""
        self.table.arbitrate()
        revoked = {slot for slot, one in self.table._slots.items() if one.is_revoked}
        parts: dict[str, list[str]] = {one: [] for one in ("computes", "recalled", "revoked", "to kill", "waits")}
        for name, slot in self.slots.items():
            page = self.table.page
            if page.read(slot, Word.GRANTED_STEPS):
                page.write(slot, Word.DEMAND, 0)
                is_recalled = page.read(slot, Word.RECALLED)
                parts["revoked" if slot in revoked else "recalled" if is_recalled else "computes"].append(name)
            elif page.read(slot, Word.DEMAND):
                parts["waits"].append(name)
        parts["to kill"] = [name for name in self.to_kill if name in self.slots]
        return "; ".join(f"{word} {' '.join(names)}" for word, names in parts.items() if names) or "idle"


def played(text: str) -> str:
    """The transcript with the states that there are."""
    story, lines = Story("mode: adbs"), list[str]()
    for line in text.splitlines():
        content = line.strip()
        if content.startswith("=>"):
            line = f"{line[: line.index('=>')]}=> {story.state()}"  # noqa: PLW2901
        elif content.startswith("arbiter "):
            story.close()
            story = Story(content.removeprefix("arbiter "))
        elif content and not content.startswith("#"):
            story.play(content)
        lines.append(line)
    story.close()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_arbiter_does_what_the_transcript_says(path: Path) -> None:
    assert played(path.read_text()).splitlines() == path.read_text().splitlines()


def test_there_are_transcripts() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 8
