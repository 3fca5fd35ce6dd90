"""Who boards, who is carried over and who is blamed: the books alone, with made-up crashes."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervised import no_pixels, request

from sightline_server.engine.flights import MOST_COMPANY, Flight, Flights
from sightline_server.engine.suspects import ALONE_AFTER, MEMORY_ENTRIES, MEMORY_S, Suspects, fingerprint


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def flights() -> Flights:
    return Flights(Suspects(Clock()))


def hold(line: Flights, *names: int) -> list[Flight]:
    return [line.hold(request(f"r{name}", tokens=(name,)), no_pixels) for name in names]


def names(some: list[Flight]) -> list[str]:
    return [flight.request.id for flight in some]


def test_all_board_at_once_while_nothing_has_crashed() -> None:
    line = flights()
    hold(line, 1, 2, 3)
    assert names(line.board()) == ["r1", "r2", "r3"]
    assert line.num_held == 0


def test_E4_after_a_crash_each_is_alone_until_its_first_token() -> None:
    line = flights()
    hold(line, 1, 2)
    line.board()
    lost, refused = line.crash()
    assert (lost, refused) == ([], [])
    hold(line, 3)
    (one,) = line.board()
    assert names([one]) == ["r1"]
    assert line.board() == []
    line.note_token(one)
    (two,) = line.board()
    assert line.board() == []
    line.note_token(two)
    assert names(line.board()) == ["r3"]


def test_E4_the_one_on_trial_goes_alone_after_a_crash_and_is_refused_after_one_more() -> None:
    line = flights()
    hold(line, 1, 2, 3)
    line.board()
    line.crash()
    (one,) = line.board()
    line.note_token(one)
    assert names(line.board()) == ["r2"]
    # Either may be why: the one that has begun is lost, the other goes on, with nothing beside it.
    lost, refused = line.crash()
    assert (names(lost), names(refused)) == (["r1"], [])
    (two,) = line.board()
    line.note_token(two)
    assert line.board() == []
    lost, refused = line.crash()
    assert (names(lost), names(refused)) == ([], ["r2"])
    assert line.suspects.is_guilty(two.fingerprint)
    assert not line.suspects.is_guilty(one.fingerprint)
    assert names(line.board()) == ["r3"]


def test_E4_what_was_in_two_crashes_goes_in_small_company_and_then_alone() -> None:
    line = flights()
    wanted = range(2 * MOST_COMPANY)
    for _ in range(2):
        for name in wanted:
            (flight,) = hold(line, name)
            line.board()
            line.note_token(flight)
        lost, refused = line.crash()
        assert (len(lost), refused) == (len(wanted), [])
    # Sent again among new ones, which are passed over once.
    for name in wanted:
        hold(line, name, 100 + name)
    company = line.board()
    assert names(company) == [f"r{name}" for name in wanted[:MOST_COMPANY]]
    for flight in company[1:]:
        line.note_token(flight)
    # One ends well, and nobody takes its place: else those that were passed over might wait for ever.
    line.land("r1")
    line.suspects.clear(company[1].fingerprint)
    assert line.board() == []
    lost, refused = line.crash()
    assert (len(lost), refused) == (MOST_COMPANY - 2, [])
    # The one that had not begun goes alone; the others of its company would, were they sent again.
    assert names(line.board()) == ["r0"]
    assert {line.suspects.crashes(flight.fingerprint) for flight in (company[0], *company[2:])} == {ALONE_AFTER}
    line.land("r0")
    passed_over = names(line.board())
    assert passed_over == [f"r{100 + name}" for name in wanted[:MOST_COMPANY]]
    for name in passed_over:
        line.land(name)
    assert names(line.board()) == [f"r{name}" for name in wanted[MOST_COMPANY:]]


def test_E4_what_another_engine_found_guilty_goes_alone() -> None:
    suspects = Suspects(Clock())
    line = Flights(suspects)
    (held,) = hold(line, 1)
    for _ in range(2):
        suspects.note_crash([held.fingerprint])
    hold(line, 2)
    assert names(line.board()) == ["r1"]


def test_E4_a_caller_that_leaves_a_hung_request_leaves_the_blame_with_it() -> None:
    line = flights()
    hold(line, 1, 2)
    line.board()
    line.crash()
    (one,) = line.board()
    one.abort_sent = True
    line.leave("r1")
    assert line.board() == []
    assert names(line.crash()[1]) == ["r1"]
    assert names(line.board()) == ["r2"]


def test_only_what_changes_the_computation_makes_another_fingerprint() -> None:
    one = request("a", tokens=(1, 2), images=(b"x",))

    def with_sampling(**changes: float) -> bytes:
        return fingerprint(msgspec.structs.replace(one, sampling=msgspec.structs.replace(one.sampling, **changes)))

    assert fingerprint(one) == fingerprint(request("b", tokens=(1, 2), images=(b"x",)))
    assert fingerprint(one) == with_sampling(seed=5) == with_sampling(choice=3)
    assert with_sampling(logit_bias={5: 1.0, 2: 3.0}) == with_sampling(logit_bias={2: 3.0, 5: 1.0}) != fingerprint(one)
    others = {
        fingerprint(request("a", tokens=(1, 3), images=(b"x",))),
        fingerprint(request("a", tokens=(1, 2), images=(b"y",))),
        fingerprint(msgspec.structs.replace(one, cache_salt=b"tenant")),
        with_sampling(temperature=0.5),
    }
    assert len(others | {fingerprint(one)}) == 5


def test_E4_blame_is_forgotten_after_a_while_after_success_and_when_there_is_too_much() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    for _ in range(2):
        suspects.note_crash([b"poison"])
    suspects.note_crash([b"mate", b"other"])
    assert suspects.is_guilty(b"poison")
    assert suspects.crashes(b"mate") == 1
    suspects.clear(b"mate")
    assert suspects.crashes(b"mate") == 0
    clock.now = MEMORY_S + 1
    assert not suspects.is_guilty(b"poison")
    assert suspects.crashes(b"other") == 0
    for number in range(MEMORY_ENTRIES + 10):
        suspects.note_crash([b"%d" % number])
    assert [suspects.crashes(b"%d" % number) for number in (9, 10)] == [0, 1]


@dataclass
class Run:
    """An engine as the books see it: each round every request gets a token, but for a poison that has come so far."""

    line: Flights
    poison: dict[str, int]
    """How many tokens a poisonous request gets before it kills the engine."""
    aboard: dict[str, Flight] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    crashes: int = 0

    def step(self, length: int) -> None:
        self.aboard |= {flight.request.id: flight for flight in self.line.board()}
        if any(self.poison.get(name) == flight.tokens for name, flight in self.aboard.items()):
            self.crashes += 1
            self.aboard = {}
            lost, refused = self.line.crash()
            for flight, why in [(flight, "lost") for flight in lost] + [(flight, "refused") for flight in refused]:
                self.end(flight, why)
            return
        for name, flight in list(self.aboard.items()):
            self.line.note_token(flight)
            if flight.tokens == length:
                self.line.land(name)
                self.line.suspects.clear(flight.fingerprint)
                del self.aboard[name]
                self.end(flight, "done")

    def end(self, flight: Flight, why: str) -> None:
        assert flight.request.id not in self.ended, f"{flight.request.id} ended twice"
        self.ended[flight.request.id] = why


@settings(max_examples=300)
@given(
    count=st.integers(1, 12),
    poison=st.dictionaries(st.integers(0, 11), st.integers(0, 3), max_size=3),
    arrivals=st.lists(st.integers(0, 10), min_size=12, max_size=12),
)
def test_E4_every_request_ends_once_and_no_innocent_is_blamed(
    count: int, poison: dict[int, int], arrivals: list[int]
) -> None:
    run = Run(flights(), {f"r{name}": after for name, after in poison.items() if name < count})
    due = sorted(range(count), key=lambda name: arrivals[name])
    for now in range(1000):
        while due and arrivals[due[0]] <= now:
            hold(run.line, due.pop(0))
        if not due and not run.aboard and not run.line.num_held:
            break
        run.step(length=4)
    assert sorted(run.ended) == sorted(f"r{name}" for name in range(count))
    for name, why in run.ended.items():
        if name in run.poison:
            assert why in ("lost", "refused")
        assert (
            not run.line.suspects.is_guilty(fingerprint(request(name, tokens=(int(name[1:]),)))) or name in run.poison
        )
        if why == "refused":
            assert name in run.poison
    # The crash a poison came in, one on trial and one alone.
    assert run.crashes <= 3 * len(run.poison)


@pytest.mark.parametrize("after", [0, 3])
def test_E4_a_poison_that_is_sent_again_and_again_is_guilty_after_four_crashes_at_most(after: int) -> None:
    run = Run(flights(), {f"r{attempt}": after for attempt in range(100, 110)})
    mates = 0
    for attempt in range(100, 110):
        wanted = request(f"r{attempt}", tokens=(666,))
        if run.line.suspects.is_guilty(fingerprint(wanted)):
            break
        run.line.hold(wanted, no_pixels)
        for _ in range(3):
            mates += 1
            hold(run.line, mates)
        while run.aboard or run.line.num_held:
            run.step(length=6)
    assert run.line.suspects.is_guilty(fingerprint(request("x", tokens=(666,))))
    assert run.crashes <= 4
    assert not any(run.line.suspects.is_guilty(fingerprint(request("x", tokens=(mate,)))) for mate in range(mates + 1))
