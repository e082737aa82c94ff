"""Process 0's answers to what its followers ask on behalf of operators."""

from collections.abc import Callable
from typing import assert_never

from cascadeinfer.core.errors import ConfigError, ScalingRefusedError, UnknownInstanceError
from cascadeinfer.frontend.admin import Admin
from cascadeinfer.frontend.processes.messages import (
    Added,
    AddInstances,
    Answer,
    BeginRoll,
    DrainInstance,
    Drains,
    Look,
    LookAtPicture,
    LookAtRoll,
    OwnersQuestion,
    Refused,
    Shown,
    UnknownInstance,
    WrongOptions,
)


async def answer(admin: Admin, question: OwnersQuestion, send: Callable[[Answer], None]) -> None:
    """
    Do or look up what a follower asks.

    Args:
        admin: Of all processes.
        question: The follower's.
        send: Sends it the answer, a refusal included.
    """
    try:
        send(await _answer_to(admin, question))
    except UnknownInstanceError:
        assert isinstance(question, DrainInstance), question
        send(UnknownInstance(question.number, question.instance_id))
    except ScalingRefusedError as refused:
        send(Refused(question.number, str(refused)))
    except ConfigError as error:
        send(WrongOptions(question.number, str(error)))


async def _answer_to(admin: Admin, question: OwnersQuestion) -> Answer:
    match question:
        case Look(number):
            return Shown(number, await admin.snapshot())
        case LookAtPicture(number):
            return Shown(number, await admin.picture())
        case LookAtRoll(number):
            return Shown(number, await admin.rolled())
        case AddInstances(number, count):
            return Added(number, await admin.add(count))
        case DrainInstance(number, instance_id, timeout_s):
            return Drains(number, await admin.drain(instance_id, timeout_s))
        case BeginRoll(number, options, timeout_s):
            return Shown(number, await admin.roll(options, timeout_s))
        case _:
            assert_never(question)
