"""The pretended cards are as strict as real ones, and count what they are asked to do."""

import threading

import numpy as np
import pytest
import torch
from pretended_cuda import pretended_cuda


@pytest.fixture
def gpu():
    with pretended_cuda() as gpu:
        yield gpu


MIXED = {
    "sum": lambda a, b: a + b,
    "in place": lambda a, b: b.add_(a),
    "product": lambda a, b: a @ b,
    "cat": lambda a, b: torch.cat([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "out": lambda a, b: torch.add(a, a, out=b),
    "a host tensor indexed from the card": lambda a, b: b[a > 0],
    "a host tensor set at an index of the card": lambda a, b: b.__setitem__(a.long(), 1.0),
    "values of the host put into the card": lambda a, b: a.__setitem__(a > 0, b),
    "index_select": lambda a, b: a.index_select(0, b.long()),
    "a number of the card added to the host's in place": lambda a, b: b[0].add_(a[0]),
}


@pytest.mark.parametrize("operation", MIXED)
def test_devices_do_not_mix(gpu, operation):
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[operation](torch.ones(3, device="cuda"), torch.ones(3))


@pytest.mark.parametrize("operation", MIXED)
def test_cards_do_not_mix(gpu, operation):
    if operation != "a number of the card added to the host's in place":
        with pytest.raises(RuntimeError, match="same device"):
            MIXED[operation](torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"))


def test_what_torch_lets_pass_between_devices(gpu):
    a, number = torch.arange(3.0, device="cuda"), torch.tensor(2.0)
    assert (a * number).tolist() == [0, 2, 4]
    assert torch.where(a > 0, number, a).tolist() == [0, 2, 2]
    assert a[torch.tensor([2, 0])].tolist() == [2, 0]
    assert a[torch.tensor([True, False, True])].tolist() == [0, 2]
    a[torch.tensor([0])] = number
    a[1:] = torch.tensor([5.0, 6.0])
    a[[1]] += 1
    assert a.tolist() == [2, 6, 6]
    assert a.copy_(torch.zeros(3)).sum() == 0
    assert torch.zeros(3).copy_(a + 1).tolist() == [1, 1, 1]


def test_tensors_know_their_card(gpu):
    assert torch.cuda.is_available()
    assert torch.zeros(1, device="cuda").device == torch.device("cuda", 0)
    there = torch.ones(2, 3).to("cuda:1")
    assert there.is_cuda
    assert (
        there.device.index == there.T.device.index == (there + 1).device.index == there.new_zeros(1).device.index == 1
    )
    assert there.cpu().device.type == "cpu"
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == there.device == torch.ones(1).cuda().device
    assert there.to("cuda").device.index == 0
    assert there.to(torch.float64).dtype == torch.float64
    assert torch.ones(1).to(there).device == there.device
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.zeros(1, device="cuda:2")


def test_what_only_main_memory_can_do_is_refused(gpu):
    there = torch.ones(3, device="cuda")
    for read in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu\(\)"):
            read()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        there.pin_memory()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        there.uniform_(generator=torch.Generator())


def test_values_are_right_in_views_and_in_place(gpu):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
    x, y = torch.as_tensor(X, device="cuda"), torch.as_tensor(Y).cuda()
    np.testing.assert_array_equal((x @ y).cpu(), torch.from_numpy(X) @ torch.from_numpy(Y))
    column = x[:, 1]
    assert column.mul_(2) is column
    np.testing.assert_array_equal(x[:, 1].cpu(), 2 * X[:, 1])
    np.testing.assert_array_equal(torch.from_numpy(X)[:, 1], X[:, 1])
    torch.mm(x, y, out=(out := torch.empty(4, 2, dtype=torch.float64, device="cuda")))
    assert bool((out == x @ y).all())


def test_a_network_runs(gpu):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()).eval()
    images = torch.rand(2, 3, 5, 5)
    expected = network(images).detach()
    network.to("cuda")
    assert all(parameter.is_cuda for parameter in network.parameters())
    torch.testing.assert_close(network(images.cuda()).detach().cpu(), expected)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert network[0](images.cuda()).dtype == torch.bfloat16


def test_launches_waits_and_pinned_bytes_are_counted(gpu):
    a = torch.zeros(10, device="cuda")
    assert gpu.launches == 1
    assert gpu.waits == 0
    b = (a + 1)[:3] * 2
    assert gpu.launches == 3
    looked = float(b.sum())
    assert looked == 6
    (line,) = gpu.sites
    assert line.startswith("tests/test_pretended_cuda.py:")
    for waiting in (a.cpu, a.tolist, lambda: a[a > 0], lambda: bool(a.any()), lambda: torch.ones(2).cuda(), a.nonzero):
        before = gpu.waits
        waiting()
        assert gpu.waits == before + 1, waiting
    torch.ones(100, 10)[:, :2].pin_memory()
    assert gpu.pinned_bytes == 4 * (99 * 10 + 2)
    torch.empty(5, dtype=torch.float64, pin_memory=True)
    assert gpu.pinned_bytes == 4 * (99 * 10 + 2) + 40


def test_what_the_host_has_not_waited_for_is_not_there(gpu):
    a, b = torch.ones(3, device="cuda"), torch.arange(3, device="cuda")
    there, counts = a.to("cpu", non_blocking=True), b.to("cpu", non_blocking=True)
    assert there.is_pinned()
    assert there.isnan().all()
    assert counts.tolist() == [0, 0, 0]
    event = torch.cuda.current_stream().record_event()
    late = a.to("cpu", non_blocking=True)
    elsewhere = torch.cuda.Stream()
    elsewhere.record_event().synchronize()
    assert np.isnan(there.numpy()).all()
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert there.tolist() == [1, 1, 1]
    assert counts.tolist() == [0, 1, 2]
    assert late.isnan().all()
    torch.cuda.synchronize()
    assert late.tolist() == [1, 1, 1]


@pytest.mark.parametrize("write", [lambda pinned: pinned.zero_(), lambda pinned: pinned.numpy().fill(0)])
def test_pinned_memory_is_not_written_while_it_is_copied(write):
    def copy(wait):
        with pretended_cuda() as gpu:
            pinned = torch.ones(3).pin_memory()
            there = pinned.to("cuda", non_blocking=True)
            assert gpu.waits == 0
            if wait:
                torch.cuda.current_stream().record_event().synchronize()
            write(pinned)
            assert there.tolist() == [1, 1, 1]

    copy(wait=True)
    with pytest.raises(RuntimeError, match="pinned memory was written"):
        copy(wait=False)


def test_a_copy_from_memory_that_is_not_pinned_waits(gpu):
    torch.ones(3).to("cuda", non_blocking=True)
    assert gpu.waits == 1
    torch.ones(3).pin_memory().to("cuda", torch.float64, non_blocking=True)
    assert gpu.waits == 2


def test_a_stream_has_to_wait_for_another(gpu):
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        a = torch.ones(3, device="cuda")
        copied = side.record_event()
    with pytest.raises(RuntimeError, match="reads what another may not have written"):
        a + 1
    main.wait_event(copied)
    a + 1
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="writes what another may still use"):
        a.zero_()
    side.wait_event(main.record_event())
    with torch.cuda.stream(side):
        a.zero_()
    torch.cuda.synchronize()
    side.synchronize()
    assert a.tolist() == [0, 0, 0]


@pytest.mark.parametrize("safe", ["record_stream", "event", "host"])
def test_memory_is_not_given_back_to_its_stream_while_another_uses_it(safe):
    def use(safely):
        with pretended_cuda():
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            with torch.cuda.stream(side):
                a = torch.ones(3, device="cuda")
            main.wait_stream(side)
            a + 1
            if safely == "record_stream":
                a.record_stream(main)
            elif safely == "event":
                side.wait_event(main.record_event())
            elif safely == "host":
                main.synchronize()
            del a

    use(safe)
    with pytest.raises(RuntimeError, match="without record_stream"):
        use(None)


def test_threads_are_on_the_card_and_have_a_stream_of_their_own(gpu):
    found = []

    def work():
        found.append((torch.ones(2, device="cuda").sum().item(), torch.cuda.current_stream() is main))

    main = torch.cuda.current_stream()
    with torch.cuda.stream(torch.cuda.Stream()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [(2.0, True)]


def test_memory_is_limited():
    with pretended_cuda(memory=1000) as gpu:
        a = torch.zeros(200, device="cuda")
        assert torch.cuda.mem_get_info() == (200, 1000)
        with pytest.raises(torch.OutOfMemoryError):
            a + 1
        torch.zeros(200, device="cuda:1")
        assert torch.cuda.mem_get_info(torch.device("cuda", 1)) == (200, 1000)
        del a
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.memory_reserved() == 800
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info() == (1000, 1000)
        assert torch.cuda.max_memory_allocated() == gpu.peak[torch.device("cuda", 0)] == 800
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0


def test_nothing_is_left_of_it():
    with pretended_cuda():
        there = torch.ones(3, device="cuda")
    assert torch.cuda.current_stream is not None
    with pytest.raises(RuntimeError, match="outside pretended_cuda"):
        there + 1
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(3, device="cuda")
