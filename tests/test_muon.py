from types import SimpleNamespace

import pytest
import torch

import optim
from detr_model import build_model
from optim import Muon, orthogonalize
from settings import DEFAULTS


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16), (3, 16, 40)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalize(x, 5) @ v.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9
    large = s > 0.02 * s.norm(dim=-1, keepdim=True)
    assert 0.5 < values[large].min() and values[large].max() < 1.3


def test_agrees_with_torch_muon():
    """torch's own takes matrices only, one by one, in bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(32, 32), (32, 32), (16, 48), (48, 16)]]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1, iterations=5)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, ns_steps=5)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, w in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - w).norm()


def test_a_convolution_is_a_matrix():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(16, 8 * 9))
    conv = torch.nn.Parameter(matrix.detach().view(16, 8, 3, 3).clone(memory_format=torch.channels_last))
    matrix.grad = torch.randn(16, 8 * 9)
    conv.grad = matrix.grad.view(16, 8, 3, 3).clone(memory_format=torch.channels_last)
    Muon([matrix], lr=0.02).step()
    Muon([conv], lr=0.02).step()
    torch.testing.assert_close(conv.detach().flatten(1), matrix.detach())


def test_parameters_without_gradient_stay():
    frozen, trained = torch.nn.Parameter(torch.ones(16, 16)), torch.nn.Parameter(torch.ones(16, 16))
    trained.grad = torch.ones(16, 16)
    Muon([frozen, trained], lr=0.1).step()
    assert (frozen == 1).all() and (trained != 1).all()


@pytest.mark.parametrize("weights, optimizer", [("none", "muon"), ("file.pth", "muon"), ("none", "adamw")])
def test_muon_gets_the_inner_matrices_of_what_is_not_pretrained(weights, optimizer):
    config = DEFAULTS | dict(
        detector="detr",
        backbone="ecvit-nano",
        backbone_weights=None,
        num_classes=20,
        num_queries=20,
        hidden_dim=32,
        num_heads=2,
        ffn_dim=64,
        decoder_layers=2,
        dropout=0.0,
    )
    model = build_model(config)[0]
    settings = SimpleNamespace(
        optimizer=optimizer,
        init=None,
        backbone_weights=weights,
        precision="float32",
        lr=1e-3,
        backbone_lr=1e-4,
        layer_decay=1.0,
        weight_decay=1e-4,
        decay_all=False,
        shard=False,
        random_parts=None,
    )
    optimizers = optim.build_optimizers(model, settings)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, *rest = [[names.pop(id(p)) for group in o.param_groups for p in group["params"]] for o in optimizers]
    assert not names  # each parameter once
    if optimizer == "adamw":
        assert rest == []
        return
    (muon,) = rest
    assert {
        "neck.mix.0.1.weight",
        "layers.0.linear1.weight",
        "layers.1.cross_attn.value_proj.weight",
        "dense_box.layers.0.weight",
    } <= set(muon)
    assert {"dense_class.weight", "class_heads.1.weight", "dense_box.layers.2.weight", "memory_norm.weight"} <= set(
        adamw
    )
    in_backbone = [name for name in muon if name.startswith("backbone.")]
    assert len(in_backbone) == 0 if weights != "none" else any("blocks.5.mlp.fc2" in name for name in in_backbone)
    assert all(group["lr"] in ((0.03, 0.003) if weights == "none" else (0.03,)) for group in optimizers[1].param_groups)


def test_muon_leaves_the_scores_and_edges_of_an_ecdet_to_adamw():
    config = dict(
        detector="ecdet",
        size="nano",
        backbone="ecvit-nano",
        backbone_weights=None,
        num_classes=20,
        num_queries=20,
        decoder_layers=2,
    )
    model = build_model(config)[0]
    settings = SimpleNamespace(
        optimizer="muon",
        init=None,
        backbone_weights="none",
        precision="float32",
        lr=1e-3,
        backbone_lr=1e-3,
        layer_decay=1.0,
        weight_decay=1e-4,
        decay_all=False,
        shard=False,
        random_parts=None,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in o.param_groups for p in group["params"]}
        for o in optim.build_optimizers(model, settings)
    )
    last = {
        "decoder.enc_score_head.weight",
        "decoder.dec_score_head.1.weight",
        "decoder.dec_bbox_head.0.layers.2.weight",
        "decoder.denoising_class_embed.weight",
    }
    assert last <= adamw and {"decoder.dec_bbox_head.0.layers.1.weight", "encoder.fpn_blocks.0.cv1.conv.weight"} <= muon


def test_bfloat16_gives_nearly_the_same_steps_and_is_kept_by_copies_and_checkpoints():
    torch.manual_seed(0)
    exact, rounded = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    optimizers = Muon([exact], lr=0.1), Muon([rounded], lr=0.1, dtype=torch.bfloat16)
    for _ in range(3):
        exact.grad = torch.randn(24, 40)
        rounded.grad = exact.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (exact - 1).norm()
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).norm() < 0.05 * moved
    again = Muon([rounded], lr=0.1)
    again.load_state_dict(optimizers[1].state_dict())
    assert again.param_groups[0]["dtype"] is torch.bfloat16
    old = optimizers[0].state_dict()
    del old["param_groups"][0]["dtype"]  # a run of before goes on in float32
    again.load_state_dict(old)
    again.step()
