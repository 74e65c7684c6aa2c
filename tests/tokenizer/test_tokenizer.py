"""The tokenizer against independent computations: four convolutions for one, digits by hand, files that are damaged."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.tokenizer.model import Inception, normalise, quantise
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return ECGTokenizer(TokenizerConfig()).eval()


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
    ids = tokenizer.encode(ecgs)
    assert ids.shape == (5, 313) and ids.dtype == np.uint16 and ids.max() < 1296
    with torch.no_grad():
        z = torch.sigmoid(tokenizer.encoder(normalise(torch.from_numpy(ecgs))[0]))
    digits = np.rint(z.numpy() * 5).astype(int)
    slow = digits[..., 0] + 6 * digits[..., 1] + 36 * digits[..., 2] + 216 * digits[..., 3]
    assert (ids == slow).mean() > 0.999  # another batch size may round a value that sits on the edge of two levels


def test_ids_do_not_depend_on_the_batch(tokenizer, ecgs):
    together = tokenizer.encode(np.concatenate([ecgs] * 5))
    alone = np.stack([tokenizer.encode(ecg) for ecg in ecgs])
    assert (together == np.concatenate([alone] * 5)).all()


def test_decode_takes_every_id(tokenizer):
    ecg = tokenizer.decode(np.arange(1296, dtype=np.uint16)[:313])
    assert ecg.shape == (12, 5000) and np.isfinite(ecg).all()
    digits = torch.arange(1296)[:, None] // torch.tensor([1, 6, 36, 216]) % 6
    direct = tokenizer.decoder(digits[None].float() / 5 * 2 - 1)[0, :, : 16 * 1296]
    np.testing.assert_allclose(tokenizer.decode(np.arange(1296, dtype=np.uint16)), direct.detach().numpy()[:, :5000], atol=1e-5)


def test_quantise_passes_the_gradient_straight_through():
    z = torch.linspace(0, 1, 11, requires_grad=True)
    quantise(z, 6).sum().backward()
    assert z.grad.tolist() == [1.0] * 11
    assert set((quantise(z, 6) * 5).round(decimals=4).tolist()) == {0, 1, 2, 3, 4, 5}


def test_loss_is_the_mean_over_lead_variances(tokenizer, ecgs):
    loss = tokenizer(torch.from_numpy(ecgs))
    z = (ecgs - ecgs.mean(-1, keepdims=True)) / ecgs.std(-1, keepdims=True)
    reconstruction = tokenizer.decode(tokenizer.encode(ecgs))
    assert loss.item() == pytest.approx(((reconstruction - z) ** 2).mean(), rel=2e-3)


def test_training_reduces_the_loss(ecgs):
    torch.manual_seed(0)
    model = ECGTokenizer(TokenizerConfig())
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
        (np.full((12, 5000), np.nan, np.float32), "not finite"),
    ],
)
def test_bad_input_is_named(tokenizer, ecg, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(ecg)


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
    ],
)
def test_a_damaged_folder_is_named(tokenizer, tmp_path, damage, message):
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        ECGTokenizer.from_pretrained(tmp_path)


def test_ids_at_a_boundary_are_those_of_float64():
    """Bias moved so that one output lies on the boundary of two digits, to 1e-8: float32, with an error of 1e-6, would toss a coin."""
    torch.manual_seed(0)
    tokenizer = ECGTokenizer(TokenizerConfig()).eval()
    ecg = np.random.default_rng(0).normal(0, 0.3, (12, 5000)).cumsum(axis=1).astype(np.float32)
    x = torch.from_numpy(ecg)[None]
    exact = copy.deepcopy(tokenizer.encoder).double()

    def outputs(encoder, x):
        with torch.no_grad():
            return encoder(normalise(x)[0])[0]

    unlike = 0
    for token in range(0, 313, 40):
        with torch.no_grad():
            exact.to_code.bias -= outputs(exact, x.double())[token]  # sigmoid(0) * 5 = 2.5
            tokenizer.encoder.to_code.bias.copy_(exact.to_code.bias)
            exact.to_code.bias.copy_(tokenizer.encoder.to_code.bias)
        digits = torch.round(torch.sigmoid(outputs(exact, x.double())) * 5).long()
        expected = (digits * 6 ** torch.arange(4)).sum(-1).numpy()
        np.testing.assert_array_equal(tokenizer.encode(ecg), expected)
        unlike += int((torch.round(torch.sigmoid(outputs(tokenizer.encoder, x)) * 5).long() != digits).sum())
    assert unlike > 0  # float32 alone does toss it
