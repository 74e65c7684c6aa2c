"""The tokenizers against independent computations: four convolutions for one, digits by hand, statistics by a loop, files that are damaged."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from toolkit.errors import UserError
from toolkit.tokenizer.fsq import codes_of, ids_of, quantise
from toolkit.tokenizer.heartspeed import Attention, Block
from toolkit.tokenizer.normalise import running, zscore
from toolkit.tokenizer.paper import Inception
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

KINDS = {
    "heartspeed": TokenizerConfig(),
    "causal": TokenizerConfig(causal=True),
    "five dimensions": TokenizerConfig(levels=[8, 5, 5, 5, 5]),
    "paper": TokenizerConfig(arch="paper"),
    "heartllm": TokenizerConfig(arch="heartllm"),
}


def flip(path):
    """One bit of the encoder's last weights."""
    weights = load_file(path)
    weights["encoder.to_code.bias"][0] = -weights["encoder.to_code.bias"][0]
    save_file(weights, path)


def untrained(config: TokenizerConfig) -> ECGTokenizer:
    """With weights everywhere: a block of heartspeed begins as the identity, which would hide half of it."""
    torch.manual_seed(0)
    tokenizer = ECGTokenizer(config).eval()
    for block in (module for module in tokenizer.modules() if isinstance(module, Block | Attention)):
        torch.nn.init.normal_(block.down.weight, std=0.1)
        if isinstance(block, Attention):
            torch.nn.init.normal_(block.out.weight, std=0.1)
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return untrained(KINDS[request.param])


@pytest.fixture(scope="module")
def ecgs():
    return np.random.default_rng(0).standard_normal((5, 12, 5000)).cumsum(-1).astype(np.float32) / 50


def test_the_merged_kernel_is_the_sum_of_four_convolutions():
    torch.manual_seed(0)
    block, x = Inception(16).double(), torch.randn(3, 16, 101, dtype=torch.float64)
    summed = sum(conv(x) for conv in block.convs)
    expected = F.leaky_relu(block.norm(summed), 0.01) + x
    torch.testing.assert_close(block(x), expected)
    gradients = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(block.parameters())))


def test_313_tokens_and_ids_from_digits(tokenizer, ecgs):
    ids, levels = tokenizer.encode(ecgs), tokenizer.config.levels
    assert ids.shape == (5, 313) and ids.dtype == np.uint16 and ids.max() < np.prod(levels) and len(np.unique(ids)) > 20
    with torch.no_grad():
        z = torch.sigmoid(tokenizer.encoder(tokenizer.normalise(torch.from_numpy(ecgs))[0])).numpy()
    slow, place = np.zeros(z.shape[:-1], int), 1
    for i, n in enumerate(levels):
        slow += np.rint(z[..., i] * (n - 1)).astype(int) * place
        place *= n
    assert (ids == slow).mean() > 0.999  # another batch size may round a value that sits on the edge of two levels


def test_ids_do_not_depend_on_the_batch(tokenizer, ecgs):
    if tokenizer.config.arch == "heartllm":
        pytest.skip("its last bits depend on the batch, as the release's do")
    together = tokenizer.encode(np.concatenate([ecgs] * 5))
    alone = np.stack([tokenizer.encode(ecg) for ecg in ecgs])
    assert (together == np.concatenate([alone] * 5)).all()


def test_decode_takes_every_id(tokenizer):
    levels, n = tokenizer.config.levels, tokenizer.config.codes
    ecg = tokenizer.decode(np.arange(n, dtype=np.uint16)[:313])
    assert ecg.shape == (12, 5000) and np.isfinite(ecg).all()
    digits = np.stack(np.unravel_index(np.arange(n), levels, order="F"), -1)  # first digit fastest
    codes = torch.from_numpy(digits / (np.array(levels) - 1)).float()
    with torch.no_grad():
        direct = tokenizer.decoder(codes[None])[0, :, :5000]
    np.testing.assert_allclose(tokenizer.decode(np.arange(n, dtype=np.uint16)), direct.numpy(), atol=1e-4)
    assert torch.equal(codes_of(torch.arange(n), levels), codes) and torch.equal(ids_of(codes, levels), torch.arange(n))


def test_quantise_passes_the_gradient_straight_through():
    z = torch.linspace(0, 1, 11)[:, None].repeat(1, 2).requires_grad_()
    made = quantise(z, [6, 3])
    made.sum().backward()
    assert z.grad.unique().tolist() == [1.0]
    assert set((made[:, 0] * 5).round(decimals=4).tolist()) == {0, 1, 2, 3, 4, 5} and set(made[:, 1].tolist()) == {0, 0.5, 1}


def test_loss_is_the_mean_over_lead_variances(tokenizer, ecgs):
    loss = tokenizer(torch.from_numpy(ecgs)).item()
    ids, made = tokenizer.reconstruct(ecgs)
    _, mean, std = (x.numpy() for x in tokenizer.normalise(torch.from_numpy(ecgs)))
    assert loss == pytest.approx((((made - ecgs) / std) ** 2).mean(), rel=2e-3)
    assert (ids == tokenizer.encode(ecgs)).all()
    np.testing.assert_allclose(made, tokenizer.decode(ids) * std + mean, atol=1e-5)


def test_loss_against_a_target_is_of_the_target(tokenizer, ecgs):
    noisy, clean = torch.from_numpy(ecgs).flip(0), torch.from_numpy(ecgs)
    with torch.no_grad():
        made = tokenizer.decode(tokenizer.encode(noisy.numpy()))
        expected = ((made - tokenizer.normalise(clean)[0].numpy()) ** 2).mean()
        assert tokenizer(noisy, clean).item() == pytest.approx(expected, rel=1e-4)


def test_bf16_leaves_weights_and_loss_in_float32(tokenizer, ecgs):
    x = torch.from_numpy(ecgs[:1])
    loss = tokenizer(x, bf16=True)
    loss.backward()
    assert loss.dtype == torch.float32 and {p.grad.dtype for p in tokenizer.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(tokenizer(x).item(), rel=0.05) and loss.item() != tokenizer(x).item()
    tokenizer.zero_grad()


def test_zscore_is_numpys():
    ecg = np.random.default_rng(2).normal(3, 0.2, (2, 12, 5000)).astype(np.float32)
    ecg[0, 3] = 0.7
    z, mean, std = zscore(torch.from_numpy(ecg))
    wide = ecg.astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), wide.mean(-1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(std.numpy(), np.maximum(wide.std(-1, keepdims=True), 1e-3), rtol=1e-9)
    np.testing.assert_allclose(z.numpy(), (wide - wide.mean(-1, keepdims=True)) / std.numpy(), rtol=1e-6)
    assert (z[0, 3].abs() < 1e-6).all() and zscore(torch.from_numpy(ecg), floor=0)[2][0, 3].item() == 1


def test_running_statistics_are_those_of_a_loop():
    """Weights exp(-age / 10 s), age in tokens; 0.5 s of a typical lead before the first sample."""
    ecg = np.random.default_rng(3).normal(1, 0.3, (1, 12, 8 + 16 * 40)).astype(np.float32)
    x, mean, std, state = running(torch.from_numpy(ecg))
    lead, sums, expected = ecg[0, 5].astype(np.float64), np.zeros(3), []
    for start, end in [(0, 8)] + [(8 + 16 * k, 24 + 16 * k) for k in range(40)]:
        block = lead[start:end]
        sums = sums * np.exp(-16 / 5000) + [len(block), block.sum(), (block**2).sum()]
        m = sums[1] / sums[0]
        s = np.sqrt((sums[2] - sums[0] * m**2 + 250 * 0.2**2) / (sums[0] + 250))
        expected.append((block - m) / s)
    np.testing.assert_allclose(x[0, 5].numpy(), np.concatenate(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[0, 5].numpy(), sums, rtol=1e-9)
    np.testing.assert_allclose((x * std + mean)[0].numpy(), ecg[0], atol=1e-5)


def test_attention_is_that_of_rotated_vectors():
    """Softmax over q k / sqrt(d), where query and key of token t are turned by t / 1000**(i / half) in the plane of their dimensions i and i + half."""
    torch.manual_seed(0)
    block, x = Attention(32).double(), torch.randn(1, 9, 32, dtype=torch.float64)
    for weight in (block.out.weight, block.down.weight):
        torch.nn.init.normal_(weight, std=0.2)
    q, k, v = block.qkv(block.norm(x))[0].reshape(9, 3, 4, 8).unbind(1)  # [token, head, 8]
    turn = np.exp(1j * np.arange(9)[:, None] * 1000 ** (-np.arange(4) / 4))
    complex_of = lambda a, head: (a[:, head, :4] + 1j * a[:, head, 4:]).detach().numpy() * turn  # noqa: E731
    heads = []
    for head in range(4):
        scores = (complex_of(q, head) @ complex_of(k, head).conj().T).real / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        heads.append(weights @ v[:, head].detach().numpy())
    y = x + block.out(torch.from_numpy(np.concatenate(heads, 1)[None]))
    expected = y + block.down(F.gelu(block.up(block.mlp_norm(y))))
    torch.testing.assert_close(block(x), expected)


def test_tokens_of_a_causal_tokenizer_never_change(ecgs):
    """And those of the others do."""
    changed = ecgs[:2].copy()
    changed[..., 2600:] = np.random.default_rng(9).normal(0, 3, changed[..., 2600:].shape)
    past = (2600 - 8) // 16 + 1  # token k is complete with sample 16 k + 8
    for kind, config in KINDS.items():
        tokenizer = untrained(config)
        same = (tokenizer.encode(ecgs[:2])[:, :past] == tokenizer.encode(changed)[:, :past]).all()
        assert same == (kind == "causal"), kind
    assert (untrained(KINDS["causal"]).encode(ecgs[:2])[:, past:] != untrained(KINDS["causal"]).encode(changed)[:, past:]).mean() > 0.5


def test_a_training_step_costs_a_fifth_of_heartllms():
    cost = {}
    for kind in ("heartspeed", "causal", "heartllm"):
        with FlopCounterMode(display=False) as counter:
            ECGTokenizer(KINDS[kind])(torch.randn(1, 12, 5000)).backward()
        cost[kind] = counter.get_total_flops()
    assert max(cost["heartspeed"], cost["causal"]) < cost["heartllm"] / 5, cost


@pytest.mark.parametrize("config", [c for kind, c in KINDS.items() if kind != "heartllm"])  # 4 M parameters at 500 Hz take too long
def test_training_reduces_the_loss(config, ecgs):
    torch.manual_seed(0)
    model = ECGTokenizer(config)
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.from_numpy(ecgs[:2])
    losses = []
    for _ in range(12):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer, ecgs, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ECGTokenizer.from_pretrained(tmp_path)
    assert (again.encode(ecgs) == tokenizer.encode(ecgs)).all()
    assert again.fingerprint() == tokenizer.fingerprint() == json.loads((tmp_path / "config.json").read_text())["fingerprint"]


def test_fingerprint_follows_the_encoder_and_not_the_decoder():
    torch.manual_seed(0)
    model = ECGTokenizer(TokenizerConfig())
    before = model.fingerprint()
    assert ECGTokenizer(TokenizerConfig()).fingerprint() != before
    with torch.no_grad():
        model.decoder.expand.weight[0, 0] += 1
    assert model.fingerprint() == before
    with torch.no_grad():
        model.encoder.to_code.bias[0] += 1e-3
    assert model.fingerprint() != before


@pytest.mark.parametrize(
    ("ecg", "message"),
    [
        (np.zeros((12, 4999), np.float32), r"expected \[B, 12, 5000\]"),
        (np.zeros((5000, 12), np.float32), r"expected \[B, 12, 5000\]"),
        (np.zeros((12, 5000), np.int16), "floating point"),
        (np.full((12, 5000), np.nan, np.float32), "finite"),
        (np.full((12, 5000), np.inf, np.float32), "finite"),
        (np.full((12, 5000), 1e39), "finite"),
        (np.zeros(5000, np.float32), r"expected \[B, 12, 5000\]"),
    ],
)
def test_bad_input_is_named(tokenizer, ecg, message):
    for method in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(ValueError, match=message):
            method(ecg)


@pytest.mark.parametrize("ids", [[1296 * 5], [-1], [1.0]])
def test_what_are_no_ids_is_named(tokenizer, ids):
    with pytest.raises(ValueError, match="ids: expected integers from 0 to"):
        tokenizer.decode(np.array(ids))


def test_ids_are_float32_whatever_the_caller_is_in(tokenizer, ecgs):
    with torch.autocast("cpu", torch.bfloat16):
        made = tokenizer.encode(ecgs[:2])
    assert (made == tokenizer.encode(ecgs[:2])).all()


def test_one_ecg_is_reconstructed_in_its_shape(tokenizer, ecgs):
    ids, made = tokenizer.reconstruct(ecgs[0])
    assert ids.shape == (313,) and made.shape == (12, 5000)


def test_another_sampling_rate_is_named(tokenizer, ecgs):
    for method in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(ValueError, match="expected 500 Hz, got 250"):
            method(ecgs, sampling_rate=250)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet"}, "--arch: must be one of heartspeed, paper, heartllm"),
        ({"levels": [1, 6]}, "--levels"),
        ({"levels": []}, "--levels"),
        ({"levels": [6.5, 6]}, "--levels"),
        ({"levels": [6, "a"]}, "--levels"),
        ({"levels": [6] * 7}, "--levels: .* at most 65,536"),
        ({"arch": "heartllm", "causal": True}, "--causal: --arch heartllm"),
    ],
)
def test_configurations_that_cannot_be_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**changes)


def test_bf16_weights_are_refused(ecgs):
    with pytest.raises(ValueError, match="float32"):
        ECGTokenizer(TokenizerConfig()).bfloat16().encode(ecgs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").write_text('{"format_version": 99}'), "format version 99"),
        (lambda f: (f / "config.json").write_text("[]"), "no tokenizer configuration"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "does not load"),
        (lambda f: ECGTokenizer(TokenizerConfig(levels=[3, 2])).save_pretrained(f / "x") or os.replace(f / "x/model.safetensors", f / "model.safetensors"),
         "does not load .*(size mismatch|[Kk]ey)"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"fingerprint": "', '"fingerprint": "0')), "is damaged"),
        (lambda f: flip(f / "model.safetensors"), "is damaged"),
    ],
)
def test_a_damaged_folder_is_named(tokenizer, tmp_path, damage, message):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ECGTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["heartspeed", "causal", "paper"])
def test_ids_at_a_boundary_are_those_of_float64(kind):
    """Bias moved so that one output lies on the boundary of two digits, to 1e-8: float32, with an error of 1e-6, would toss a coin."""
    tokenizer = untrained(KINDS[kind])
    ecg = np.random.default_rng(0).normal(0, 0.3, (12, 5000)).cumsum(axis=1).astype(np.float32)
    x = tokenizer.normalise(torch.from_numpy(ecg)[None])[0]
    exact, unlike = copy.deepcopy(tokenizer.encoder).double(), 0
    for token in range(0, 313, 40):
        with torch.no_grad():
            exact.to_code.bias -= exact(x.double())[0, token]  # sigmoid(0) * 5 = 2.5
            tokenizer.encoder.to_code.bias.copy_(exact.to_code.bias)
            exact.to_code.bias.copy_(tokenizer.encoder.to_code.bias)
            digits = torch.round(torch.sigmoid(exact(x.double())[0]) * 5).long()
            expected = (digits * 6 ** torch.arange(4)).sum(-1).numpy()
            np.testing.assert_array_equal(tokenizer.encode(ecg), expected)
            unlike += int((torch.round(torch.sigmoid(tokenizer.encoder(x)[0]) * 5).long() != digits).sum())
    assert unlike > 0  # float32 alone does toss it
