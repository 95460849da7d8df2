"""What a request does for the sources of experts: one object for each decode leg, if any source is on."""

from __future__ import annotations

from eldr.kernels import JsonObject
from eldr.router.experts.answers import ExpertAnswers
from eldr.router.experts.expected import ExpectedReports


class ExpertSources:
    """The sources that are on.

    reports: whether workers report finished requests.
    answers: None if the experts of answers are not read.
    """

    def __init__(self, expected: ExpectedReports, reports: bool, answers: ExpertAnswers | None) -> None:
        self.expected = expected
        self.reports = reports
        self.answers = answers

    def close(self) -> None:
        if self.answers is not None:
            self.answers.close()

    def watch(
        self, leg_name: str, request_id: str, model: str | None, max_tokens: int | None, body: JsonObject | None
    ) -> LegWatch | None:
        """Watch an attempt that is about to be sent. None if no source will see it.

        body: of a request whose answer is whole and may state experts. None for others, such as streams.
        """
        answers = self.answers
        reads = answers is not None and body is not None and not answers.leaves(body)
        wanted = reads and answers is not None and answers.drawn()
        if self.reports or wanted:
            self.expected.expect(leg_name, request_id, model, max_tokens)
        elif not reads or answers is None or not answers.unasked:
            return None
        return LegWatch(self, leg_name, model, reads, wanted)


class LegWatch:
    """One attempt. reads: whether the experts are taken out of its answer. wanted: whether they are read."""

    __slots__ = ("_leg_name", "_model", "_reads", "_sources", "_wanted")

    def __init__(self, sources: ExpertSources, leg_name: str, model: str | None, reads: bool, wanted: bool) -> None:
        self._sources = sources
        self._leg_name = leg_name
        self._model = model
        self._reads = reads
        self._wanted = wanted

    def asking(self, body: bytes) -> bytes:
        """Return the body of the leg, which may have to ask for the experts."""
        answers = self._sources.answers
        return body if answers is None or not self._wanted else answers.ask(body)

    def take(self, fields: JsonObject) -> bytes | None:
        """Return what the client gets of a whole answer. None if that is all of it."""
        answers = self._sources.answers
        if answers is None or not self._reads:
            return None
        return answers.take(self._leg_name, self._model, self._wanted, fields)

    def failed(self) -> None:
        """The attempt has failed."""
        self._sources.expected.forget(self._leg_name)
