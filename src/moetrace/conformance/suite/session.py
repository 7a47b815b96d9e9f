"""One run: asks in flight, sequences numbered, answers judged, all kept by check."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask, Subject
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.judge import Judgement, World, judge
from moetrace.conformance.suite.renumbering import fits, renumbering
from moetrace.conformance.suite.scene import Asked
from moetrace.errors import CheckError, LackingError
from moetrace.ranges import require_ranges


@dataclass(frozen=True)
class Plan:
    """How much is asked.

    Attributes:
        requests: requests of the check under load; 512, or 64; 0 leaves it out.
        in_flight: most requests at once; 64.
        max_tokens: longest sequence, prompt and output; 8448, or 2304, and never above the checkpoint's window.
        flood_tokens: prompt tokens that are sent to push a prefix out of the engine's cache; 65536, or 4096.
        pressure: long outputs at once, to make the engine preempt; 128, or 24; 0 leaves it out.
        pressure_tokens: tokens of each of them; 1024, or 160.
        seed: of the prompts.
        timeout: seconds until a request, or an update of weights, counts as lost; 600.

    Raises:
        CheckError: a value is out of range.
    """

    requests: int = 512
    in_flight: int = 64
    max_tokens: int = 8448
    flood_tokens: int = 65536
    pressure: int = 128
    pressure_tokens: int = 1024
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        require_ranges(
            self, CheckError, requests=0, in_flight=1, max_tokens=1, flood_tokens=0, pressure=0, pressure_tokens=1
        )
        if not self.timeout > 0:  # nor is NaN
            raise CheckError("timeout is out of range", expected="more than 0 seconds", got=self.timeout)

    @classmethod
    def quick(cls, **changes: int) -> Plan:
        """About a tenth of it."""
        return replace(
            cls(requests=64, max_tokens=2304, flood_tokens=4096, pressure=24, pressure_tokens=160), **changes
        )


@dataclass
class Tally:
    """What one check came to; `reason` is why it was skipped."""

    reason: str = ""
    seconds: float = 0.0
    sequences: int = 0
    rows: int = 0
    missing: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unexplained: list[tuple[int, tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)
    """Which findings are of rows that nothing explains, and the rows."""


class Session:
    """Asks an engine and judges its answers.

    Args:
        subject: the engine.
        form: its weights.
        plan: how much is asked.
        newer: a second checkpoint, for an update: its folder as the engine sees it, and its form; and the folder of
            the first, to go back to.
        progress: told of every answer, by the name of its check.
    """

    def __init__(
        self,
        subject: Subject,
        form: DyeForm,
        plan: Plan,
        newer: tuple[str, DyeForm, str] | None = None,
        progress: Callable[[str], None] = lambda check: None,
    ) -> None:
        self.subject, self.plan, self.newer = subject, plan, newer
        self.world, self.check, self.tally = World(form), "", Tally()
        self.payloads = Tally()
        """What the dialect's strict reader says of all payloads, whichever check asked."""
        self.random = random.Random(plan.seed)
        self.max_tokens = min(plan.max_tokens, subject.window or plan.max_tokens)
        self._gate, self._progress = asyncio.Semaphore(plan.in_flight), progress
        self._ticks = self._sequences = 0

    @property
    def form(self) -> DyeForm:
        """The weights in force."""
        return self.world.form

    def begin(self, check: str) -> None:
        """From now on answers belong to this check."""
        self.check, self.tally = check, Tally()

    def tokens(self, count: int) -> tuple[int, ...]:
        """Tokens by chance, but the one that ends sequences."""
        return tuple(self.random.choices(range(self.form.vocab_size - 1), k=count))

    def before_end(self, distance: int) -> int:
        """The token after which the one that ends sequences comes as number `distance`."""
        return self.form.vocab_size - 1 - distance

    def find(self, finding: Finding) -> None:
        """Keep a finding that is not of one answer alone."""
        self.tally.findings.append(replace(finding, check=self.check))

    async def one(self, ask: Ask, *, optional: bool = False) -> list[Answer]:
        """As `all`, for one."""
        return (await self.all([ask], optional=optional))[0]

    async def all(self, asks: Sequence[Ask], *, optional: bool = False) -> list[list[Answer]]:
        """Ask all at once, as many in flight as the plan allows, and judge.

        Args:
            asks: the requests.
            optional: an engine may lack this; else a refusal is a finding.

        Returns:
            The answers, in the order of `asks`; none for a request that failed.

        Raises:
            LackingError: the engine or its dialect has no such feature; the answers of the others are judged.
        """
        done = await asyncio.gather(*(self._ask(ask, optional) for ask in asks), return_exceptions=True)
        lacking = None
        for result in done:
            if isinstance(result, LackingError):
                lacking = result
            elif isinstance(result, BaseException):
                raise result
        if lacking is not None:
            raise lacking
        return [result for result in done if not isinstance(result, BaseException)]

    async def update_weights(self, folder: str, form: DyeForm) -> None:
        """Bring the weights of a checkpoint, which are in force from then on; raises as `Subject.update_weights`."""
        try:
            async with asyncio.timeout(self.plan.timeout):
                await self.subject.update_weights(folder, str(form.weight_version))
        except TimeoutError as error:
            raise CheckError(f"the weights were not there in {self.plan.timeout:g} seconds") from error
        self.world.switch(form)

    async def _ask(self, ask: Ask, optional: bool) -> list[Answer]:
        async with self._gate:
            self._ticks += 1
            began, form, number = self._ticks, self.form, self._sequences
            self._sequences += ask.n
            self.world.book.add(Asked(number, np.array(ask.prompt, np.int64), began))
            try:
                async with asyncio.timeout(self.plan.timeout):
                    answers = list(await self.subject.ask(ask))
            except (CheckError, TimeoutError) as error:
                if optional and isinstance(error, LackingError):
                    raise
                what = str(error) or f"no answer in {self.plan.timeout:g} seconds"
                self.find(Finding(self.check, Bug.ERROR, what, lengths=(len(ask.prompt), ask.max_new_tokens)))
                return []
            self._ticks += 1
            self._judge(ask, answers, form, number, began)
            self._progress(self.check)
            return answers

    def _judge(self, ask: Ask, answers: list[Answer], form: DyeForm, number: int, began: int) -> None:
        if len(answers) != ask.n:
            got = f"{len(answers)} sequences"
            self.find(Finding(self.check, Bug.SAMPLES, expected=f"{ask.n} sequences", got=got))
        tokens = [np.array([*ask.prompt, *answer.output], np.int64) for answer in answers]
        for which, answer in enumerate(answers[: ask.n]):
            asked = Asked(number + which, tokens[which], began, self._ticks)
            siblings = {i: other for i, other in enumerate(tokens) if i != which}
            self._count(judge(self.world, form, ask, answer, asked, siblings, self.check))
            self.world.book.add(asked)
            if answer.rows is not None and answer.rows.refusal is not None:
                self.payloads.sequences += 1
                self.payloads.rows += len(answer.rows.ids_TLK)

    def _count(self, judgement: Judgement) -> None:
        tally = self.tally
        self.payloads.findings += [finding for finding in judgement.findings if finding.bug is Bug.PAYLOAD]
        judgement.findings[:] = [finding for finding in judgement.findings if finding.bug is not Bug.PAYLOAD]
        if judgement.unexplained is not None:
            which = next(i for i, finding in enumerate(judgement.findings) if finding.bug is Bug.UNKNOWN)
            tally.unexplained.append((len(tally.findings) + which, judgement.unexplained))
        tally.findings += judgement.findings
        tally.sequences += 1
        tally.rows += judgement.rows
        tally.missing += judgement.missing


def name_renumbered(tallies: Sequence[Tally], num_experts: int) -> None:
    """Name the rows that nothing explains, where one renumbering of the experts explains them over all checks."""
    rows = [pair for tally in tallies for _, pair in tally.unexplained]
    found = renumbering([want for want, _ in rows], [got for _, got in rows], num_experts)
    if found is None:
        return
    maps, words = found
    for tally in tallies:
        for which, (want, got) in tally.unexplained:
            if fits(want, got, maps):
                tally.findings[which] = replace(tally.findings[which], bug=Bug.PHYSICAL, detail=words)
