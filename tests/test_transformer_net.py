"""TransformerNet against the same network in plain PyTorch layers, and through every way of running it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from _reference import rounded_to_tf32, tf32
from styleforge.models import (
    CheckpointError,
    TorchTransformerNet,
    TransformerNet,
    load_checkpoint,
    save_checkpoint,
)

# The names in the public checkpoints of pytorch/examples.
PUBLIC_NAMES = (
    [f"{layer}.conv2d.{kind}" for layer in ("conv1", "conv2", "conv3") for kind in ("weight", "bias")]
    + [f"in{number}.{kind}" for number in range(1, 6) for kind in ("weight", "bias")]
    + [
        f"res{number}.{layer}.{kind}"
        for number in range(1, 6)
        for layer in ("conv1.conv2d", "in1", "conv2.conv2d", "in2")
        for kind in ("weight", "bias")
    ]
    + [f"{layer}.conv2d.{kind}" for layer in ("deconv1", "deconv2", "deconv3") for kind in ("weight", "bias")]
)


def make_net(base_channels: int = 8, dtype: torch.dtype = torch.float32) -> TransformerNet:
    """A network with random norm parameters, so that a wrong or unused one shows."""
    torch.manual_seed(0)
    net = TransformerNet(base_channels)
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.to(dtype).eval()


def photo(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (255 * torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(dtype)


def relative_error(result: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    return ((result.double() - reference).norm() / reference.norm()).item()


def test_parameter_names_are_those_of_public_checkpoints() -> None:
    assert sorted(TransformerNet(1).state_dict()) == sorted(PUBLIC_NAMES)
    assert sorted(TorchTransformerNet(1).state_dict()) == sorted(PUBLIC_NAMES)
    shapes = {name: tensor.shape for name, tensor in TransformerNet().state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in TorchTransformerNet().state_dict().items()}
    assert shapes["conv1.conv2d.weight"] == (32, 3, 9, 9)
    assert shapes["res5.conv2.conv2d.weight"] == (128, 128, 3, 3)
    assert shapes["deconv1.conv2d.weight"] == (64, 128, 3, 3)


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (2, 3, 33, 47), (1, 3, 30, 21), (3, 3, 5, 64), (1, 3, 9, 7)]
)
def test_matches_plain_layers(shape: tuple[int, ...]) -> None:
    net = make_net()
    plain = net.to_torch()
    x = photo(*shape)
    with torch.no_grad():
        result, expected = net(x), plain(x)
        reference = copy.deepcopy(plain).double()(x.double())
    assert result.shape == expected.shape
    # The order of sums differs, so the yardstick is each one's distance to float64.
    assert relative_error(result, reference) <= 1.5 * relative_error(expected, reference) + 1e-6


def test_matches_plain_layers_at_full_width() -> None:
    net = make_net(32)
    x = photo(1, 3, 44, 52)
    with torch.no_grad():
        assert relative_error(net(x), net.to_torch()(x)) < 1e-5


@pytest.mark.parametrize(
    ("size", "expected"),
    [((16, 20), (16, 20)), ((17, 18), (20, 20)), ((15, 14), (16, 16)), ((21, 31), (24, 32))],
)
def test_output_size_is_rounded_up_to_a_multiple_of_four(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    with torch.no_grad():
        assert make_net(2)(photo(1, 3, *size)).shape[2:] == expected


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 0.08), (torch.float16, 0.01), (torch.float64, 1e-10)]
)
def test_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    net = make_net().double()
    x = photo(1, 3, 24, 28, dtype=torch.float64)
    with torch.no_grad():
        reference = net.to_torch()(x)
        result = net.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert relative_error(result, reference) < limit


def test_keeps_the_memory_format_of_the_input() -> None:
    net = make_net()
    x = photo(2, 3, 16, 24)
    with torch.no_grad():
        contiguous, channels_last = net(x), net(x.contiguous(memory_format=torch.channels_last))
    assert contiguous.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    torch.testing.assert_close(contiguous, channels_last)


def test_inner_memory_format_does_not_change_the_result() -> None:
    net = make_net()
    plain_format = TransformerNet(8, channels_last=False)
    plain_format.load_state_dict(net.state_dict())
    x = photo(1, 3, 20, 24)
    with torch.no_grad():
        assert relative_error(plain_format(x), net(x)) < 1e-5


def conv_weights(net: nn.Module) -> list[Tensor]:
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_weights_lie_in_the_layout_of_the_activations(tmp_path) -> None:
    net = make_net(4)
    assert len(conv_weights(net)) == 16
    assert all(map(is_channels_last, conv_weights(net)))
    assert not any(map(is_channels_last, conv_weights(TransformerNet(4, channels_last=False))))
    plain = net.to_torch()
    assert not any(map(is_channels_last, conv_weights(plain)))
    path = tmp_path / "net.safetensors"
    save_checkpoint(net, path)
    loaded = TransformerNet(4)
    loaded.load_state_dict(plain.state_dict())
    for copied in (
        TransformerNet.from_torch(plain),
        load_checkpoint(path),
        loaded,
        copy.deepcopy(net).half(),
    ):
        assert all(map(is_channels_last, conv_weights(copied)))
        for name, tensor in copied.state_dict().items():
            assert torch.equal(tensor, net.state_dict()[name].to(tensor.dtype)), name


def test_weights_in_another_layout_work() -> None:
    net = make_net(4)
    x = photo(1, 3, 20, 24)
    with torch.no_grad():
        expected = net(x)
        contiguous = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        net.load_state_dict(contiguous, assign=True)
        assert not any(map(is_channels_last, conv_weights(net)))
        torch.testing.assert_close(net(x), expected)


def test_strided_input() -> None:
    net = make_net(4)
    x = photo(1, 3, 40, 48)[:, :, ::2, 8:40]
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(x.contiguous()))


def test_gradients_match_plain_layers() -> None:
    net = make_net(4).double().train()
    plain = net.to_torch()
    x = photo(2, 3, 12, 16, dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    target = photo(2, 3, 12, 16, dtype=torch.float64)
    (net(x) - target).square().mean().backward()
    (plain(y) - target).square().mean().backward()
    torch.testing.assert_close(x.grad, y.grad)
    expected = dict(plain.named_parameters())
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("conv2d.bias") and not name.startswith("deconv3"):
            # Instance normalisation cancels these biases. Zeros, not None: DDP waits for every gradient.
            assert not parameter.grad.any(), name
            assert expected[name].grad.abs().max() < 1e-8
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_trains_with_distributed_data_parallel(dtype: torch.dtype | None, tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        net = torch.nn.parallel.DistributedDataParallel(make_net(4).train())
        for _ in range(2):  # the second step asks what became of every gradient of the first
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net(photo(1, 3, 12, 16)).float().square().mean()
            loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_transforms_match_a_loop() -> None:
    """vmap over pictures, per-sample gradients, and several networks at once."""
    from torch.func import functional_call, grad, stack_module_state, vmap

    net, x = make_net(2).double(), photo(3, 3, 12, 16, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def run(parameters: dict[str, Tensor], picture: Tensor) -> Tensor:
        return functional_call(net, parameters, (picture[None],))[0]

    expected = net(x).detach()
    torch.testing.assert_close(vmap(run, (None, 0))(parameters, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(vmap(run, (None, 0))(parameters, x), expected)

    loss = grad(lambda parameters, picture: run(parameters, picture).square().sum())
    per_sample = vmap(loss, (None, 0))(parameters, x)
    for i, picture in enumerate(x):
        for name, gradient in loss(parameters, picture).items():
            torch.testing.assert_close(per_sample[name][i], gradient, msg=name)

    nets = [make_net(2).double(), net.to_torch()]
    stacked, _ = stack_module_state([nets[0], TransformerNet.from_torch(nets[1])])
    results = vmap(run, (0, None))(stacked, x[0])
    torch.testing.assert_close(results, torch.stack([n(x[:1])[0] for n in nets]))


def test_script_saved_and_loaded(tmp_path) -> None:
    net = make_net(4)
    path = tmp_path / "net.pt"
    torch.jit.script(net).save(path)
    loaded = torch.jit.load(path)
    x = photo(1, 3, 18, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x))


def test_trace() -> None:
    net = make_net(4)
    x = photo(1, 3, 16, 24)
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
        torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_has_no_graph_break(dynamic: bool) -> None:
    net = make_net(2)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for size in ((16, 24), (20, 16)):
            x = photo(2, 3, *size)
            torch.testing.assert_close(compiled(x), net(x))


def test_export_with_dynamic_batch_and_size() -> None:
    net = make_net(2)
    dynamic = {0: torch.export.Dim("batch", max=16), 2: torch.export.Dim("height", min=16, max=2048)}
    dynamic[3] = torch.export.Dim("width", min=16, max=2048)
    with torch.no_grad():
        program = torch.export.export(net, (photo(2, 3, 24, 32),), dynamic_shapes={"x": dynamic})
        for shape in ((2, 3, 24, 32), (3, 3, 36, 20), (1, 3, 16, 16)):
            x = photo(*shape)
            torch.testing.assert_close(program.module()(x), net(x))


def test_to_torch_and_from_torch_are_inverse() -> None:
    net = make_net(4).half().train()
    plain = net.to_torch()
    assert isinstance(plain, TorchTransformerNet)
    assert plain.training
    assert plain.conv1.conv2d.weight.dtype == torch.float16
    again = TransformerNet.from_torch(plain)
    assert again.training
    assert again.base_channels == 4
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    # Copies, not views of the same memory.
    with torch.no_grad():
        plain.conv1.conv2d.weight.zero_()
    assert again.conv1.conv2d.weight.abs().max() > 0
    assert net.conv1.conv2d.weight.abs().max() > 0
    assert not TransformerNet.from_torch(plain.eval()).training


def test_from_torch_refuses_another_network() -> None:
    with pytest.raises(CheckpointError, match="no TransformerNet"):
        TransformerNet.from_torch(nn.Conv2d(3, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"base_channels": 0}, "at least 1"), ({"precision": "fp8"}, "fp8")]
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerNet(**arguments)


def test_pictures_too_small_to_reflect_are_refused() -> None:
    with pytest.raises(RuntimeError), torch.no_grad():
        make_net(2)(photo(1, 3, 4, 16))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "fast"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, True)],
)
def test_cuda_matches_plain_layers(dtype: torch.dtype, fast: bool) -> None:
    net = make_net(32).cuda()
    x = photo(2, 3, 70, 92).cuda()
    with torch.no_grad(), tf32(fast):
        reference = net.to_torch().double()(x.double())
        # cuDNN may use TF32 in some layers and float32 in others of this size: what TF32 in all of them does.
        allowed = tf32_error(net, x, reference) if dtype == torch.float32 and fast else 0.0
        net = net.to(dtype)
        expected = relative_error(net.to_torch()(x.to(dtype)), reference)
        result = relative_error(net(x.to(dtype)), reference)
    assert result <= max(1.5 * expected, 1.2 * allowed) + 1e-6


def tf32_error(net: TransformerNet, x: Tensor, reference: Tensor) -> float:
    """The error of exact convolutions of operands that are rounded to TF32."""
    plain = net.to_torch().double()
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(rounded_to_tf32(layer.weight))
            layer.register_forward_pre_hook(lambda _, inputs: (rounded_to_tf32(inputs[0]),))
    return relative_error(plain(x.double()), reference)
