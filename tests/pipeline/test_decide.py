"""The one decision on a node: laws that hold for whatever is known of its result."""

from hypothesis import given
from hypothesis import strategies as st

from rrlhf.pipeline.decide import Facts, decide

words = st.sampled_from(["", "said"])
some = st.sampled_from([(), ("said",)])
facts = st.builds(
    Facts,
    allowed=st.booleans(),
    forced=st.booleans(),
    missing=some,
    twin=words,
    here=st.booleans(),
    accepted=words,
    elsewhere=words,
    lacking=st.just(("never made here",)),
)


@given(facts)
def test_what_a_run_may_not_compute_it_never_does(known):
    action, _ = decide(known)
    assert known.allowed or action in {"reuse", "restore", "skip"}


@given(facts)
def test_what_is_there_is_not_computed_unless_it_is_forced(known):
    action, _ = decide(known)
    if (known.here or known.elsewhere) and not (known.missing or known.twin):
        assert (action in {"run", "skip"}) == known.forced


@given(facts)
def test_nothing_is_done_without_a_reason_but_reusing(known):
    action, reasons = decide(known)
    assert reasons or (action == "reuse" and not known.accepted)


@given(facts)
def test_a_node_waits_for_what_is_missing_whatever_else_is_known(known):
    if known.missing:
        assert decide(known)[0] == ("upstream" if known.allowed else "skip")
