import processes
import pytest
import torch

from ddkit.runtime.cached import cache_key, cached_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "two.safetensors"


def two():
    return {"two": torch.full((2,), 2.0)}


def unwanted():
    pytest.fail("made again")


def test_tensors_are_made_once_and_then_read(path):
    assert torch.equal(cached_tensors(path, ["two"], "twos", two)["two"], torch.full((2,), 2.0))
    assert torch.equal(cached_tensors(path, ["two"], "twos", unwanted)["two"], torch.full((2,), 2.0))


@pytest.mark.parametrize("content", [b"", b"torn", None])
def test_a_file_that_is_damaged_or_holds_other_tensors_is_made_again(path, content):
    cached_tensors(path, ["one"], "ones", lambda: {"one": torch.ones(1)})
    if content is not None:
        path.write_bytes(content)
    assert set(cached_tensors(path, ["two"], "twos", two)) == {"two"}
    assert set(cached_tensors(path, ["two"], "twos", unwanted)) == {"two"}


def test_nothing_is_kept_of_a_computation_that_raises(path):
    with pytest.raises(ZeroDivisionError):
        cached_tensors(path, ["two"], "twos", lambda: {"two": torch.ones(1 // 0)})
    assert not path.exists()


def test_a_cache_that_may_not_be_written_costs_the_computation_each_time(tmp_path):
    (tmp_path / "file").write_text("in the way of the folder")
    path = tmp_path / "file" / "two.safetensors"
    for _ in range(2):
        assert set(cached_tensors(path, ["two"], "twos", two)) == {"two"}
    assert (tmp_path / "file").is_file()


@pytest.mark.slow
def test_two_processes_make_it_once(path):
    program = (
        "import sys, time, torch; from pathlib import Path; from ddkit.runtime.cached import cached_tensors\n"
        "def make():\n    print('made'); time.sleep(0.5); return {'two': torch.ones(2)}\n"
        f"cached_tensors(Path({str(path)!r}), ['two'], 'twos', make)"
    )
    both = [processes.start("-c", program) for _ in range(2)]
    assert "".join(process.communicate()[0] for process in both) == "made\n"


def test_cache_key_differs_with_any_part():
    keys = [
        cache_key((1, "a")),
        cache_key((1, "b")),
        cache_key((1, "a"), [torch.ones(2)]),
        cache_key((1, "a"), [torch.zeros(2)]),
    ]
    assert len(set(keys)) == 4 and keys[2] == cache_key((1, "a"), [torch.ones(1), torch.ones(1)])
