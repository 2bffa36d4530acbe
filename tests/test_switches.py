"""Settings that the process shares: on while any thread needs them, and the user's own afterwards."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from estimators import group_lasso_path
from estimators.switches import full_precision
from h2t_store import extract
from h2t_store.network import load_backbone
from h2t_store.switches import exact_arithmetic, module_by_module

SWITCHES = {"estimators": full_precision(), "networks": exact_arithmetic, "modules": module_by_module}
NEW = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
PARTS = {
    "all": lambda: torch.backends,
    "cuda": lambda: torch.backends.cudnn,
    "products": lambda: torch.backends.cuda.matmul,
    "convolutions": lambda: torch.backends.cudnn.conv,
    "products on the CPU": lambda: torch.backends.mkldnn.matmul,
    "convolutions on the CPU": lambda: torch.backends.mkldnn.conv,
}


def settings() -> dict[str, object]:
    """What can be asked of torch; a question that it refuses is an answer, too."""
    questions = {
        "products": torch.get_float32_matmul_precision,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "convolutions": lambda: torch.backends.cudnn.allow_tf32,
        "enabled": lambda: torch.backends.cudnn.enabled,
        "deterministic": lambda: torch.backends.cudnn.deterministic,
        "benchmark": lambda: torch.backends.cudnn.benchmark,
        "fast path": torch.backends.mha.get_fastpath_enabled,
    }
    if hasattr(torch.backends, "fp32_precision"):
        questions |= {f"new {name}": lambda part=part: part().fp32_precision for name, part in PARTS.items()}
    answers: dict[str, object] = {}
    for name, ask in questions.items():
        try:
            answers[name] = ask()
        except RuntimeError:
            answers[name] = "refused"
    return answers


def is_exact(switch) -> bool:
    now = settings()
    if switch is module_by_module:
        return now["fast path"] is False
    products = now["products"] == "highest" and now["cublas"] is False
    parts = [name for name in PARTS if switch is exact_arithmetic or "products" in name]
    products &= all(now.get(f"new {part}") not in ("tf32", "bf16", "refused") for part in parts)
    if switch is exact_arithmetic:
        flags = [now[name] for name in ("convolutions", "enabled", "deterministic", "benchmark")]
        return products and flags == [False, True, True, False]
    return products


@pytest.fixture(autouse=True)
def as_torch_has_it():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.backends.mha.set_fastpath_enabled(True)
    if hasattr(torch.backends, "fp32_precision"):
        for name, part in PARTS.items():
            part().fp32_precision = "tf32" if name == "convolutions" else "none"


USERS = {
    "as torch has it": lambda: None,
    "the older interface": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 of one library": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "no TF32 in convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "benchmarks": lambda: setattr(torch.backends.cudnn, "benchmark", True),
}
USERS_OF_NEW = {
    name: lambda part=part, value=value: setattr(PARTS[part](), "fp32_precision", value)
    for name, part, value in [
        ("all", "all", "tf32"),
        ("products", "products", "tf32"),
        ("convolutions", "convolutions", "ieee"),
        ("products on the CPU", "products on the CPU", "bf16"),
        ("cuda", "cuda", "tf32"),
    ]
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize(
    "set_by_user",
    [*USERS.values(), *(pytest.param(user, marks=NEW) for user in USERS_OF_NEW.values())],
    ids=[*USERS, *(f"the newer interface: {name}" for name in USERS_OF_NEW)],
)
def test_a_users_own_setting_comes_back_whichever_way_it_was_made(switch, set_by_user):
    set_by_user()
    before = settings()
    with switch:
        assert is_exact(switch)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), switch:
        raise ZeroDivisionError
    assert settings() == before
    torch.backends.mha.set_fastpath_enabled(False)
    with switch:
        assert is_exact(switch)
    assert torch.backends.mha.get_fastpath_enabled() is False


@NEW
def test_what_followed_a_general_setting_still_follows_it():
    torch.backends.fp32_precision = "tf32"
    with exact_arithmetic, full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "first in, last out"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_switch_holds_until_the_last_thread_has_left(switch, order, fails):
    torch.set_float32_matmul_precision("medium")
    before = settings()
    threads = [ThreadPoolExecutor(1) for _ in order]
    stacks = [ExitStack() for _ in order]
    for thread, stack in zip(threads, stacks, strict=True):
        thread.submit(stack.enter_context, switch).result()
        assert is_exact(switch)
    error = (ValueError, ValueError(), None) if fails else (None, None, None)
    threads[order[0]].submit(stacks[order[0]].__exit__, *error).result()
    for thread in threads:
        assert thread.submit(is_exact, switch).result()
    threads[order[1]].submit(stacks[order[1]].__exit__, *error).result()
    assert settings() == before


@pytest.mark.parametrize(
    "set_by_user",
    [*USERS.values(), *(pytest.param(user, marks=NEW) for user in USERS_OF_NEW.values())],
    ids=[*USERS, *(f"the newer interface: {name}" for name in USERS_OF_NEW)],
)
@pytest.mark.parametrize("first_in", [0, 1], ids=["fit first", "extraction first"])
@pytest.mark.parametrize("first_out", [0, 1], ids=["fit ends first", "extraction ends first"])
def test_a_fit_beside_an_extraction_holds_and_gives_back(set_by_user, first_in, first_out):
    set_by_user()
    before = settings()
    both = [full_precision(), exact_arithmetic]
    stacks = [ExitStack(), ExitStack()]
    for which in (first_in, 1 - first_in):
        stacks[which].enter_context(both[which])
    assert all(map(is_exact, both))
    stacks[first_out].close()
    assert is_exact(both[1 - first_out])
    stacks[1 - first_out].close()
    assert settings() == before


def test_overlapping_fits_are_each_in_full_precision():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 8)), np.arange(30) % 2
    torch.set_float32_matmul_precision("medium")
    began, seen = threading.Event(), []

    def first(_):
        began.set()
        overlap.wait()

    def second(point):
        overlap.set()
        alone.wait()
        seen.append(is_exact(full_precision()))

    overlap, alone = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(group_lasso_path, X, y, n_alphas=1, callback=first)
        began.wait()
        two = pool.submit(group_lasso_path, X, y, n_alphas=2, callback=second)
        one.result()
        alone.set()
        two.result()
    assert seen == [True, True]
    assert torch.get_float32_matmul_precision() == "medium"


def test_protected_memory_is_read_without_a_warning(recwarn):
    rng = np.random.default_rng(2)
    X, y = rng.normal(size=(30, 8)).astype(np.float32), np.arange(30) % 2
    expected = group_lasso_path(X.copy(), y, n_alphas=3)
    X.flags.writeable = False
    torch.set_warn_always(True)
    try:
        path = group_lasso_path(X, y, n_alphas=3)
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
    np.testing.assert_array_equal(path.objective, expected.objective)


class Precision(torch.nn.Module):
    """Notes how exactly it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, 2)
        self.seen: list[bool] = []

    def forward(self, x):
        self.seen.append(is_exact(exact_arithmetic))
        return self.head(self.conv(x).mean((2, 3)))


def test_networks_are_run_in_full_float32_linear_layers_too(tmp_path, images):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    before, model = settings(), Precision()
    extract((images, None), model=model, store=tmp_path / "s", name="x")
    assert len(model.seen) > 3
    assert all(model.seen)
    assert settings() == before


def test_random_weights_of_one_seed_are_the_same_in_threads_side_by_side():
    def weights(_: int = 0) -> str:
        return load_backbone("h2t_resnet20", pretrained=False, seed=0).weights_sha256

    expected, state = weights(), torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(weights, range(8))) == {expected}
    assert torch.get_rng_state().equal(state)
