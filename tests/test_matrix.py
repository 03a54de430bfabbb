"""What the page of versions says of a run, and no more."""

import pytest
from matrix import WHOLE, joined, lower_bounds, page, pins, proof

RUN = {
    "row": "oldest",
    "python": "3.11.7",
    "numpy": "2.4.6",
    "seconds": 100,
    "failures": [],
    "torch": "2.13.0+cpu",
    "optree": "0.13.0",
    "tests": WHOLE,
    "passed": 9,
    "failed": 0,
    "skipped": 1,
}


@pytest.mark.parametrize(
    ("name", "bound"), [("python", "3.11"), ("torch", "2.13"), ("optree", "0.13"), ("torch", "2.13.0")]
)
def test_a_whole_suite_that_passes_with_the_bound_proves_it(name, bound):
    assert proof(name, bound, [RUN]) == f"- {name}>={bound}: proven by the row oldest ({name} {RUN[name]})."


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"failed": 2}, "oldest: 2 failed"),
        ({"tests": "tests/test_laws.py"}, "oldest: tests/test_laws.py alone"),
        ({"broken": "pytest ended with 2", "failed": None}, "oldest: pytest ended with 2"),
        ({"torch": "2.14.0"}, "no row ran with it"),
        ({"torch": "2.130"}, "no row ran with it"),
    ],
)
def test_anything_less_proves_nothing(change, why):
    assert proof("torch", "2.13", [RUN | change]) == f"- torch>=2.13: not proven; {why}."
    assert "not proven" in page([RUN | change], {})


def test_failures_stand_on_the_page():
    text = page(
        [RUN | {"failed": 1, "failures": ["tests/test_laws.py::test_off"]}, RUN | {"row": "newest"}], {"3.11.7": ""}
    )
    assert "- `tests/test_laws.py::test_off`" in text
    assert text.count("\n| ") == 3


def test_failures_that_pass_again_are_counted_as_such():
    before = RUN | {"failed": 2, "failures": ["a", "b"]}
    again = RUN | {"tests": "a b", "passed": 1, "failed": 1, "skipped": 0, "failures": ["b"], "seconds": 5}
    once = joined(before, again)
    assert once == before | {"passed": 10, "failed": 1, "again": 2, "failures": ["b"], "seconds": 105}
    twice = joined(once, again | {"failed": 0, "failures": []})
    assert (twice["passed"], twice["failed"], twice["again"]) == (11, 0, 3)
    assert proof("torch", "2.13", [twice]).startswith("- torch>=2.13: proven")
    assert joined(before, again | {"torch": "2.14.0"}) == before
    assert joined(before, again | {"broken": "pytest ended with 2"}) == before


def test_bounds_come_from_the_project_and_leave_its_requirements_free():
    assert lower_bounds().keys() == {"python", "torch", "optree"}
    free = [line.partition("==")[0] for line in pins()]
    assert not {"torch", "optree"} & set(free)
    assert {"numpy", "pytest", "pytorch_bio_transformations"} <= set(free)
