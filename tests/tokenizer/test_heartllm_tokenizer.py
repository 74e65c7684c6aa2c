"""The release's tokenizer against its own arithmetic, written down anew: lead after lead, from the names in `best.pt`."""

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.tokenizer import from_heartllm
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """(path of a best.pt with random weights, its state dict)."""
    torch.manual_seed(3)
    ours = ECGTokenizer(TokenizerConfig(arch="heartllm")).state_dict()
    state = {name.replace("encoder.", "enc.", 1).replace("decoder.", "dec.", 1): tensor for name, tensor in ours.items()}
    path = tmp_path_factory.mktemp("release") / "best.pt"
    torch.save({"model": state, "epoch": 3}, path)
    # as parameters: torch takes another way through `linear` where the weight needs no gradient, and the last bits differ
    return path, {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def ecgs():
    return (np.random.default_rng(1).standard_normal((4, 12, 5000)).cumsum(-1) / 40).astype(np.float32)


def inception(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    parts = [F.conv1d(x, state[f"{name}.inc.b{i}.weight"], padding=i) for i in (1, 2, 3)]  # kernels 3, 5, 7
    made = torch.cat([*parts, F.conv1d(F.max_pool1d(x, 3, 1, 1), state[f"{name}.inc.b4.weight"])], 1)
    match = F.conv1d(x, state[f"{name}.match.weight"]) if f"{name}.match.weight" in state else x
    return F.leaky_relu(F.group_norm(made + match, 8, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]))


@torch.no_grad()
def released(state: dict, ecgs: np.ndarray) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(outputs in [0, 1], ids, reconstruction in standard deviations) as the release computes them."""
    x = torch.from_numpy(np.stack([StandardScaler().fit_transform(ecg.T.astype(np.float64)).T for ecg in ecgs]).astype(np.float32))
    leads = []
    for lead in range(12):
        h = x[:, lead : lead + 1]
        for i in range(4):
            h = F.conv1d(inception(state, f"enc.blocks.{i}.0", h), state[f"enc.blocks.{i}.1.weight"], stride=2, padding=1)
        leads.append(inception(state, "enc.bottleneck", h))
    z = torch.sigmoid(F.linear(torch.cat(leads, 1).transpose(1, 2), state["enc.to_code.weight"], state["enc.to_code.bias"]))
    digits = torch.round(z * 5).numpy().astype(int)
    h = F.linear(torch.round(z * 5) / 5, state["dec.expand.weight"], state["dec.expand.bias"]).transpose(1, 2)
    for i in range(4):
        h = F.conv_transpose1d(h, state[f"dec.up.{i}.weight"], state[f"dec.up.{i}.bias"], stride=2, padding=1, output_padding=1)
        h = inception(state, f"dec.dec.{i}", h)
    made = F.conv1d(h, state["dec.final.weight"], state["dec.final.bias"])[..., :5000]
    return z, digits[..., 0] + 6 * digits[..., 1] + 36 * digits[..., 2] + 216 * digits[..., 3], made.numpy()


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_ids_and_reconstruction_are_the_releases(best, ecgs, batch):
    path, state = best
    tokenizer = ECGTokenizer.from_heartllm(path)
    z, ids, made = released(state, ecgs[:batch])
    assert len(np.unique(ids)) > 20
    with torch.no_grad():
        assert torch.equal(torch.sigmoid(tokenizer.encoder.as_released(tokenizer.normalise(torch.from_numpy(ecgs[:batch]))[0])), z)  # to the last bit
        torch.testing.assert_close(torch.sigmoid(tokenizer.encoder(tokenizer.normalise(torch.from_numpy(ecgs[:batch]))[0])), z, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(tokenizer.encode(ecgs[:batch]), ids)
    np.testing.assert_allclose(tokenizer.decode(ids.astype(np.uint16)), made, atol=2e-4)


def test_ids_of_real_ecgs_are_the_releases(best, ecg_data):
    from toolkit.ecg.records import read_record

    path, state = best
    names = sorted((ecg_data / "ptbxl_mv" / "records500").rglob("*.hea"))[:10]  # the release encodes ten at a time
    ecgs = np.stack([read_record(name.with_suffix("")) for name in names])
    np.testing.assert_array_equal(ECGTokenizer.from_heartllm(path).encode(ecgs), released(state, ecgs)[1])


def test_it_has_the_releases_size():
    tokenizer = ECGTokenizer(TokenizerConfig(arch="heartllm"))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (tokenizer.encoder, tokenizer.decoder)]
    assert sizes == [30_692, 4_139_916]  # counted in the release


def test_imported_from_the_command_line(best, ecgs, tmp_path, capsys):
    from_heartllm.main([str(best[0]), "--out", str(tmp_path / "T")])
    again = ECGTokenizer.from_pretrained(tmp_path / "T")
    np.testing.assert_array_equal(again.encode(ecgs[0]), released(best[1], ecgs[:1])[1][0])
    with pytest.raises(UserError, match="--out: .* is there already"):
        from_heartllm.main([str(best[0]), "--out", str(tmp_path / "T")])


class Payload:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, state: None, "no such file"),
        (lambda path, state: path.write_bytes(b"no zip"), "not a file of nothing but tensors"),
        (lambda path, state: torch.save(state, path), "no tokenizer of the HeartLLM release"),
        (lambda path, state: torch.save({"model": {k: v for k, v in state.items() if "bottleneck" not in k}}, path), "bottleneck"),
        (lambda path, state: torch.save({"model": state, "more": Payload()}, path), "not a file of nothing but tensors"),
    ],
)
def test_what_is_no_best_pt_is_named(best, tmp_path, capsys, make, message):
    make(tmp_path / "x.pt", best[1])
    with pytest.raises(UserError, match=message):
        ECGTokenizer.from_heartllm(tmp_path / "x.pt")
    assert "unpickled" not in capsys.readouterr().out
