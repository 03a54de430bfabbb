"""What the page of versions says of a run, and no more."""

import pytest
from matrix import WHOLE, lower_bounds, page, pins, proof

RUN = {
    "row": "oldest",
    "python": "3.11.7",
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
        [RUN | {"failed": 1, "failures": ["tests.test_laws::test_off"]}, RUN | {"row": "newest"}], {"3.11.7": ""}
    )
    assert "- `tests.test_laws::test_off`" in text
    assert text.count("\n| ") == 3


def test_bounds_come_from_the_project_and_leave_its_requirements_free():
    assert lower_bounds().keys() == {"python", "torch", "optree"}
    free = [line.partition("==")[0] for line in pins()]
    assert not {"torch", "optree"} & set(free)
    assert {"numpy", "pytest", "pytorch_bio_transformations"} <= set(free)
