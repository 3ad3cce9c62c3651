"""The strategy: one Flower round is one protocol round, with one request for each part."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fwdllm.protocol import wire
from fwdllm.protocol.flower.mail import Mail
from fwdllm.protocol.flower.messages import Reply, Task
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.secure import sums
from fwdllm.protocol.secure.cohort import Cohort
from fwdllm.protocol.secure.letters import SecureError, Stage
from fwdllm.protocol.server import Closed, Server
from fwdllm.protocol.wire import WireError

# Seconds between looks for nodes while there are too few.
_POLL = 1.0

# Takes a client's answer; why it is refused, or None.
Take: TypeAlias = "Callable[[int, bytes], str | None]"


class FwdLLMStrategy(Strategy):
    """Federated fine-tuning by forward passes: seeds go down, scalars come up.

    The rounds, their state and every contribution are in a ledger. To resume a run that was stopped
    or killed, make a strategy from its ledger and call ``start`` with
    ``num_rounds=strategy.rounds_left``. ``timeout`` of ``start`` limits the first request of a
    round; ``FederationConfig.deadline`` limits further ones. A round closes with a quorum
    (``FederationConfig.quorum``) of answers; nodes that have vanished cost nothing but the wait.
    Answers that come later are rejected as late. Where sums alone are seen, a part that was open
    when a run was stopped is closed without asking anybody again.
    One Flower round is one update of the adapter, in as many requests as pacing wants.

    Clients are numbered in the order in which their nodes first appear.

    Parameters
    ----------
    ledger : Ledger
        Of a new run (``Ledger.create``) or of the run to resume; writable.
    min_nodes : int (default: 2)
        Nodes that must be connected before a request; where sums alone are seen, three at least.
    clock : Callable[[], float] (default: time.time)
        The current time in seconds, recorded in the ledger.
    """

    def __init__(
        self, ledger: Ledger, min_nodes: int = 2, clock: Callable[[], float] = time.time
    ) -> None:
        self.server = Server(ledger)
        self.min_nodes = max(min_nodes, sums.LEAST) if self.server.config.secure else min_nodes
        self.closed: Closed | None = None
        self._clock = clock
        self._model = json.dumps(ledger.meta.model)
        self._grid: Grid | None = None
        self._known: dict[int, int] = {}
        self._timeout = self.server.config.deadline
        # When a Flower run begins, no node holds any state.
        self.server.forget_all()
        if self.server.config.secure and self.server.part >= 0:
            # A sum of it may have been opened, in a run of Flower's that nodes no longer know. With
            # a second one of the same part, the difference of both could be one client's scalars.
            self.server.close_part(self._clock())

    @property
    def rounds_left(self) -> int:
        """Rounds still to run."""
        return self.server.config.rounds - self.server.round

    @property
    def arrays(self) -> ArrayRecord:
        """The adapter: theta, float32 [n]."""
        return ArrayRecord({"theta": Array(self.server.replica.theta.copy())})

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """See Flower's. Replies that come after their part has closed are recorded as late."""
        mail = Mail(grid)
        result = super().start(mail, *args, **kwargs)
        self._take(mail.pull())
        mail.close()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The first request of a round; after a restart, its assignments without an answer yet."""
        self._grid = grid
        return [] if self.server.config.secure else self._request()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the answers, send more requests while the round needs them, then update."""
        assert self._grid is not None
        closed = None
        while closed is None and self.server.config.secure:
            self._add_up(self._open())
            closed = self.server.close_part(self._clock())
        while closed is None:
            lost = self._take(replies)
            if lost:
                again = [a for a in self._open() if a.client in lost]
                self._take(self._send(self._messages(again)))
            closed = self.server.close_part(self._clock())
            if closed is None:
                replies = self._send(self._request())
        self.closed = closed
        return self.arrays, MetricRecord(
            {
                "round": closed.round,
                "parts": closed.parts,
                "asked": closed.n_asked,
                "accepted": closed.n_accepted,
                "perturbations": closed.n_perturbations,
                **({} if closed.loss is None else {"loss": closed.loss}),
                **({} if closed.variance is None else {"variance": closed.variance}),
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nodes are not asked to evaluate; give ``start`` an ``evaluate_fn``."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """None, because nodes are not asked."""
        return None

    def summary(self) -> None:
        """Log the settings that differ most between runs."""
        c = self.server.config
        log(INFO, "\t├──> Rounds: %d of %d are done", self.server.round, c.rounds)
        log(INFO, "\t├──> Clients a request: %d, quorum %g", c.per_round, c.quorum)
        log(INFO, "\t├──> Upload: %s, seeds: %s, method: %s", c.upload, c.seeds, c.method)
        log(INFO, "\t└──> Ledger: %s", self.server.ledger.path)

    def _add_up(self, assignments: Sequence[Assignment]) -> None:
        """Have the open part's scalars added under masks; nothing is taken if that fails."""
        server, clients = self.server, [a.client for a in assignments]
        if not clients:
            return
        size = sums.size(server.config, assignments[0])
        cohort = Cohort(server.config, server.round, server.part, clients, size, server.history())
        try:
            while not cohort.done:
                lost = self._exchange(cohort, assignments, clients)
                if lost:
                    self._exchange(cohort, assignments, lost)
                cohort.close()
        except SecureError as error:
            log(WARNING, "no sum of round %d: %s", server.round + 1, error)
            return
        reason = server.receive_sum(cohort.vectors, cohort.total, self._clock())
        if reason is not None:
            log(WARNING, "the sum of round %d was rejected: %s", server.round + 1, reason)

    def _exchange(
        self, cohort: Cohort, assignments: Sequence[Assignment], clients: Collection[int]
    ) -> set[int]:
        """Ask clients for their answers of the cohort's stage; gives those that lost a state."""

        def take(client: int, reply: bytes) -> str | None:
            try:
                reason = cohort.take(client, wire.decode_letter(reply))
            except WireError as error:
                reason = f"malformed: {error}"
            if reason is not None:
                self.server.refuse(client, reason, len(reply), self._clock())
            return reason

        asked = [a for a in assignments if a.client in clients]
        # Nodes that have gone meanwhile are not waited for: the others do without them.
        nodes = {client: node for node, client in self._known.items()}
        with self.server.ledger.batch():
            messages = self._messages_to(nodes, asked, cohort)
        return self._take(self._send(messages), take)

    def _request(self) -> list[Message]:
        """Messages to the clients that should answer now: in the open part, or in a new one."""
        return self._messages(self._open())

    def _open(self) -> list[Assignment]:
        return self.server.open_part(sorted(self._clients().values()), self._clock())

    def _messages(self, assignments: Iterable[Assignment]) -> list[Message]:
        nodes = {client: node for node, client in self._clients().items()}
        with self.server.ledger.batch():
            return self._messages_to(nodes, assignments)

    def _messages_to(
        self,
        nodes: Mapping[int, int],
        assignments: Iterable[Assignment],
        cohort: Cohort | None = None,
    ) -> list[Message]:
        """Messages with assignments, or those of a stage of secure aggregation."""
        messages, letters = [], {} if cohort is None else cohort.letters()
        for assignment in assignments:
            client = assignment.client
            if client not in nodes or (cohort and client not in letters):
                continue  # the node has just disconnected, or has left a stage out
            letter = wire.encode_letter(letters[client]) if cohort else b""
            if cohort is None or cohort.stage == Stage.VECTOR:
                work = wire.encode_assignment(assignment), self.server.synchronize(client)
            else:
                work = b"", b""
            task = Task(*work, self._model, letter)
            self.server.sent(assignment, sum(map(len, work)) + len(letter))
            messages.append(
                Message(
                    content=task.content(),
                    message_type=MessageType.TRAIN,
                    dst_node_id=nodes[assignment.client],
                )
            )
        return messages

    def _send(self, messages: list[Message]) -> Iterable[Message]:
        assert self._grid is not None
        return self._grid.send_and_receive(messages, timeout=self._timeout) if messages else []

    def _take(self, replies: Iterable[Message], take: Take | None = None) -> set[int]:
        """Hand replies to the server; gives the clients that have lost their state.

        take: what does it, instead of ``Server.receive``.
        """
        with self.server.ledger.batch():
            return self._take_each(replies, take or self._receive)

    def _receive(self, client: int, report: bytes) -> str | None:
        return self.server.receive(client, report, self._clock())

    def _take_each(self, replies: Iterable[Message], take: Take) -> set[int]:
        lost = set()
        for message in replies:
            client = self._known.get(message.metadata.src_node_id)
            if message.has_error():
                self._note_error(client, str(message.error.reason))
                continue
            if client is None:
                log(WARNING, "node %d is not known", message.metadata.src_node_id)
                continue
            report = Reply.of(message.content).report
            if report is None:
                self.server.forget(client)
                lost.add(client)
                continue
            reason = take(client, report)
            if reason is not None:
                log(WARNING, "client %d was rejected: %s", client, reason)
        return lost

    def _note_error(self, client: int | None, error: str) -> None:
        version = wire.version_spoken(error)
        if client is None or version is None or version == wire.VERSION:
            log(WARNING, "a node did not answer: %s", error)
            return
        reason = self.server.left_out(client, version, self._clock())
        log(WARNING, "client %d was left out: %s", client, reason)

    def _clients(self) -> dict[int, int]:
        """Client numbers of the connected nodes, by node id; waits for ``min_nodes`` nodes."""
        assert self._grid is not None
        while len(nodes := sorted(self._grid.get_node_ids())) < self.min_nodes:
            log(INFO, "waiting for nodes: %d of %d", len(nodes), self.min_nodes)
            time.sleep(_POLL)
        clients = {node: self.server.ledger.client_of(str(node)) for node in nodes}
        self._known |= clients
        return clients
