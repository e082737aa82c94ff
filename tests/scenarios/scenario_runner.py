"""
Golden transcripts: scripted conversations between a shell and the cascade policy, with the policy's effects at each
step.

A transcript begins with a comment (`#` lines that say what it shows) and a setup (`stages`, `capacity` and `option`
lines; boundaries are fixed unless `option refine=on`). Then come commands (`> ...`), each followed by its effects.
`cd tests && python -m scenarios.scenario_runner --rewrite` updates the effects; read the difference before you commit
it. Commands:

    join ID...                     instances are ready
    arrive REQUEST PROMPT [cap=N] [pinned]
    report ID [grow=N]             an instance reports; `grow`: its running requests have produced N tokens each since
    finish REQUEST
    deliver all | N [twice]        messages under way reach their recipients, N by its number
    drop N                         message N is lost
    end MIGRATION OUTCOME          a migration is over
    wait SECONDS                   timers fire
    drain ID / lose ID [target]    `target`: requests under way were in the target's hands
    rounds                         open rounds: asker's and bidder's states
"""

import sys
from pathlib import Path
from typing import Any

from cascadeinfer.core.effects import (
    AdviseScale,
    AssignTerms,
    Dispatch,
    Effect,
    PublishLayout,
    Reject,
    SendMessage,
    StartMigration,
)
from cascadeinfer.core.events import MigrationOutcome, PinReason
from cascadeinfer.core.layout import StageLayout
from cascadeinfer.core.messages import Accept, Advert, Ask, Award, BalanceMessage, Bid, Decline, Withdraw
from cascadeinfer.core.policies.cascade import Cascade
from cascadeinfer.core.types import InstanceCapacity
from support.policy_world import World

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


def show_message(message: BalanceMessage) -> str:  # noqa: PLR0911 - one line per message
    """A message in one line."""
    match message:
        case Ask():
            return f"ask {message.ask_id}: {message.request_id}, {message.length_tokens} tokens, {message.reason}"
        case Bid():
            return f"bid {message.ask_id}: load {message.load:.3f}, {message.free_blocks} blocks free"
        case Award():
            return f"award {message.ask_id}"
        case Accept():
            return f"accept {message.ask_id}"
        case Decline():
            return f"decline {message.ask_id}: {message.reason}"
        case Withdraw():
            return f"withdraw {message.ask_id}"
        case Advert():
            return f"advert: load {message.load:.3f}"


class Transcript:
    """A scenario in progress."""

    def __init__(self) -> None:
        self.policy = Cascade()
        self.world = World(self.policy)
        self._numbers: dict[int, SendMessage] = {}
        self._sent = 0

    def set_up(self, lines: list[str]) -> None:
        """Follow the setup lines."""
        options: dict[str, Any] = {"refine": False}
        capacity = self.world.capacity
        for line in lines:
            word, *rest = line.split()
            if word == "stages":
                boundaries = tuple(int(stage.split(":")[0].split("-")[0]) for stage in rest[1:])
                groups = tuple(tuple(stage.split(":")[1].split(",")) for stage in rest)
                options["layout"] = StageLayout.from_boundaries(boundaries, groups)
            elif word == "option":
                name, _, value = rest[0].partition("=")
                options[name] = int(value) if value.isdecimal() else {"on": True, "off": False}[value]
            elif word == "capacity":
                capacity = InstanceCapacity(**{k: int(v) for k, _, v in (part.partition("=") for part in rest)})
            else:
                raise ValueError(f"no such setup: {line}")
        self.policy = Cascade(**options)
        self.world = World(self.policy, capacity, may_hold_back="max_queued" in options)

    def command(self, line: str) -> list[str]:
        """Carry out a command; returns its effects, one line each."""
        word, *rest = line.split()
        before = len(self.world.log)
        shown: list[str] = getattr(self, f"_{word}")(*rest) or []
        return shown + [self._show(effect) for effect in self.world.log[before:]]

    def _show(self, effect: Effect) -> str:  # noqa: PLR0911 - one line per effect
        match effect:
            case Dispatch():
                return f"dispatch {effect.request_id} -> {effect.instance_id}"
            case Reject():
                return f"reject {effect.request_id}: {effect.reason}, again in {effect.retry_after_s:g} s"
            case StartMigration():
                ends = f"{effect.source_id} -> {effect.target_id}"
                return f"migrate {effect.migration_id}: {effect.request_id} {ends}, {effect.reason.value}"
            case SendMessage():
                self._sent += 1
                self._numbers[self._sent] = effect
                return f"#{self._sent} {effect.sender_id} -> {effect.recipient_id} {show_message(effect.message)}"
            case PublishLayout():
                stages = [f"{stage.range}: {' '.join(stage.instance_ids)}" for stage in effect.layout.stages]
                return f"layout {' | '.join(stages)}"
            case AssignTerms():
                return f"assign {effect.instance_id}: {effect.terms.role}, budget {effect.terms.budget_tokens}"
            case AdviseScale():
                return f"advise {effect.n_instances} instances: {effect.why}"

    def _place_of(self, number: str) -> int:
        wanted = self._numbers.get(int(number.removeprefix("#")))
        places = [place for place, message in enumerate(self.world.flying) if message is wanted]
        if not places:
            raise ValueError(f"message {number} is not under way")
        return places[0]

    def _join(self, *ids: str) -> None:
        self.world.join(*ids)

    def _arrive(self, request_id: str, prompt: str, *more: str) -> None:
        cap = next((int(word.removeprefix("cap=")) for word in more if word.startswith("cap=")), 4000)
        pin = PinReason.LORA if "pinned" in more else None
        self.world.arrive(request_id, int(prompt), cap, pin_reason=pin)

    def _report(self, instance_id: str, *more: str) -> None:
        self.world.grow(instance_id, int(more[0].removeprefix("grow=")) if more else 0)
        self.world.report(instance_id)

    def _finish(self, request_id: str) -> None:
        self.world.finish(request_id)

    def _deliver(self, number: str, *more: str) -> None:
        if number != "all":
            self.world.deliver(self._place_of(number), twice="twice" in more)
            return
        while self.world.flying:  # one at a time, so that messages are numbered in the order in which they are sent
            self.world.deliver()

    def _drop(self, number: str) -> None:
        del self.world.flying[self._place_of(number)]

    def _end(self, migration_id: str, outcome: str) -> None:
        self.world.end(migration_id, MigrationOutcome(outcome))

    def _wait(self, seconds: str) -> None:
        self.world.advance(float(seconds))

    def _drain(self, instance_id: str) -> None:
        self.world.drain(instance_id)

    def _lose(self, instance_id: str, *more: str) -> None:
        self.world.lose(instance_id, at_target="target" in more)

    def _rounds(self) -> list[str]:
        shown: list[str] = []
        for instance_id, agent in sorted(self.policy.agents.items()):
            shown += [
                f"{instance_id} asks {r.ask_id} for {r.request_id}: {r.state.value}"
                for r in agent.asker.rounds.values()
            ]
            shown += [f"{instance_id} bids {r.ask_id}: {r.state.value}" for r in agent.bidder.offers.values()]
        return shown or ["none"]


def play(text: str) -> str:
    """The transcript with the policy's present effects."""
    transcript = Transcript()
    setup: list[str] = []
    written: list[str] = []
    playing = False
    for line in text.splitlines():
        if line.startswith("> "):
            if not playing:
                transcript.set_up(setup)
                playing = True
            written += ["", line] if written and written[-1] != "" else [line]
            try:
                written += transcript.command(line.removeprefix("> "))
            except (ValueError, KeyError) as error:
                written.append(f"WRONG: {error!r}")
        elif line.startswith("#") and not line.startswith(tuple(f"#{digit}" for digit in range(10))):
            written += ["", line] if playing and written and written[-1] != "" else [line]
            if playing:
                written.append("")
        elif not playing and line:
            setup.append(line)
            written.append(line)
        elif not playing:
            written.append(line)
    return "\n".join(written).rstrip() + "\n"


def main() -> None:
    """Check every transcript, or rewrite it."""
    rewrite = "--rewrite" in sys.argv[1:]
    for path in SCENARIOS:
        text = path.read_text()
        now = play(text)
        if now != text and rewrite:
            path.write_text(now)
        sys.stdout.write(f"{path.name}: {'as written' if now == text else 'rewritten' if rewrite else 'differs'}\n")


if __name__ == "__main__":
    main()
