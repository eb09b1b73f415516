"""The official recipes, written from their description, beside what we do instead.

Sources: UCDIR's ``loader.py``, ``builder.py`` and ``main.py`` (ProtoOT's are a fork of them).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import faiss
import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import resnet18

from tests.benchmarks.arms import Comparison, near
from tests.benchmarks.bank import B, D, K, T, bank_loss
from ucir.config.data import AugmentParams, PackParams, ViewParams
from ucir.config.model import EncoderParams
from ucir.data.augment import InputFormat, draw_view, eval_views, render_views
from ucir.data.batches import seeded
from ucir.data.decode import decode_image, fitted
from ucir.data.pack import DomainImages
from ucir.losses.universal import product_dissimilarity
from ucir.memory import Bank
from ucir.methods.base import SETTLED
from ucir.methods.registry import METHODS
from ucir.models.embedding import CHUNK, pooled_features
from ucir.models.encoder import new_encoder
from ucir.models.runtime import compiled
from ucir.prototypes.clustering import cluster_means, kmeans
from ucir.retrieval.metrics import average_precision, precision_at
from ucir.retrieval.ranking import rank
from ucir.training.training import Training

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@cache
def photos(count: int) -> list[bytes]:
    """Pictures of 500 x 375 px with structure at every scale, as JPEG of quality 90."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        layers = [
            Image.fromarray(rng.integers(0, 256, (375 // cell + 1, 500 // cell + 1, 3), np.uint8))
            for cell in (4, 16, 60)
        ]
        scaled = [
            np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC), np.float32) for layer in layers
        ]
        buffer = io.BytesIO()
        Image.fromarray(np.mean(scaled, axis=0).astype(np.uint8)).save(buffer, "jpeg", quality=90)
        pictures.append(buffer.getvalue())
    return pictures


@cache
def packed(count: int, side: int) -> tuple[Tensor, Tensor]:
    """The same as a pack holds them, uint8 (N, S, S, 3), and their sizes."""
    pictures = [decode_image(data, 10**8) for data in photos(count)]
    params = PackParams(side=side)
    stored = torch.from_numpy(np.stack([fitted(picture, params) for picture in pictures]))
    return stored, torch.tensor([picture.size for picture in pictures])


def aug_plus(side: int) -> transforms.Compose:
    """MoCo v2's aug-plus as UCDIR's loader composes it."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = transforms.RandomApply(
        [transforms.Lambda(lambda p: p.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))], p=0.5
    )
    crop = transforms.RandomResizedCrop(side, (0.2, 1.0))
    last = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([crop, jitter, transforms.RandomGrayscale(0.2), blur, *last])


def plain(side: int) -> transforms.Compose:
    """Resize(256) and CenterCrop(224), in proportion."""
    last = [transforms.CenterCrop(side), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([transforms.Resize(round(side * 256 / 224)), *last])


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def random_views(side: int, store: int, count: int = 64) -> Comparison:
    """Two augmented views of each picture: decode and torchvision against the pack and our renderer."""
    stored, sizes = packed(count, store)
    transform = aug_plus(side)
    form, turn = InputFormat(side), iter(range(10**9))

    def official() -> Tensor:
        return torch.stack([transform(p) for p in map(opened, photos(count)) for _ in range(2)])

    def ours() -> Tensor:
        generator = seeded(next(turn))
        draws = [draw_view(AugmentParams(), sizes, generator) for _ in range(2)]
        return torch.cat([render_views(stored, draw, ViewParams(), form) for draw in draws])

    def same(one: Tensor, other: Tensor) -> str:
        means, spreads = ((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))) for x in (one, other))
        gap = float(torch.stack([means[0] - spreads[0], means[1] - spreads[1]]).abs().max())
        assert gap < 0.25, f"means and deviations of the channels differ by {gap:.2f}"
        return f"means and deviations of the channels differ by {gap:.2f}"

    return Comparison(f"{2 * count} augmented views of {side} px", official, ours, same)


def plain_views(side: int, store: int, count: int = 64) -> Comparison:
    """The pictures of a feature pass."""
    stored, sizes = packed(count, store)
    transform, form = plain(side), InputFormat(side)

    def same(one: Tensor, other: Tensor) -> str:
        gap = float((one - other).abs().mean() / one.std())
        assert gap < 0.15, f"pixels differ by {gap:.2f} of a deviation"
        return f"pixels differ by {gap:.2f} of a deviation"

    return Comparison(
        f"{count} pictures of a feature pass at {side} px",
        lambda: torch.stack([transform(opened(data)) for data in photos(count)]),
        lambda: eval_views(stored, sizes, ViewParams(), form),
        same,
    )


def unit(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def bank_losses(rows: int) -> Comparison:
    """UCDIR's instance- and cluster-wise contrast of a domain, forward and backward, after the write."""
    generator = torch.Generator().manual_seed(0)
    start_ND, label_N = unit(rows, 1), torch.randint(K, (rows,), generator=generator)
    slot_B = torch.randperm(rows, generator=generator)[:B]
    k_BD, first_BD = unit(B, 2), unit(B, 3)
    bank_ND, bank = start_ND.clone(), Bank(start_ND)
    sum_KD, size_K = bank.sums(label_N, K), label_N.bincount(minlength=K)

    def official() -> tuple[Tensor, Tensor]:
        q = first_BD.clone().requires_grad_(True)
        bank_ND.index_copy_(0, slot_B, k_BD)
        queue_ND = bank_ND.clone().detach()
        mask_BN = torch.ones(B, rows, dtype=torch.bool)
        mask_BN[torch.arange(B), slot_B] = False
        positive_B1 = (q * k_BD).sum(dim=1, keepdim=True)
        negative_BN = torch.masked_select(q @ queue_ND.T, mask_BN).reshape(B, -1)
        logits = torch.cat([positive_B1, negative_BN], dim=1) / T
        instance = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long))
        queue_ND = bank_ND.clone().detach()
        logits_BN = q @ queue_ND.T / T
        log_probability_BN = logits_BN - logits_BN.exp().sum(dim=1, keepdim=True).log()
        own_BN = (label_N[slot_B][:, None] == label_N[None, :]).float()
        cluster_B = -(own_BN * log_probability_BN).sum(dim=1) / own_BN.sum(dim=1)
        loss = instance + cluster_B.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert q.grad is not None
        return loss.detach(), q.grad

    def ours() -> tuple[Tensor, Tensor]:
        q = first_BD.clone().requires_grad_(True)
        loss = bank_loss(bank, q, k_BD, slot_B, label_N, sum_KD, size_K)
        loss.backward()  # type: ignore[no-untyped-call]
        assert q.grad is not None
        return loss.detach(), q.grad

    rounds = 9 if rows < 500_000 else 3
    return Comparison(f"UCDIR's bank losses, {rows} rows", official, ours, near(1e-4), rounds)


def matching(rows: int) -> Comparison:
    """UEM's D of a batch to a domain, eq. 15, as it is printed, and by one product."""
    x_BD, row_ND = unit(B, 1), unit(rows, 2)

    def official() -> Tensor:
        cosine_BN = F.normalize(x_BD, dim=1) @ F.normalize(row_ND, dim=1).T
        return (1 - cosine_BN) * torch.cdist(x_BD, row_ND, compute_mode="donot_use_mm_for_euclid_dist")

    name = f"UEM's D of {B} pictures to {rows}"
    return Comparison(name, official, lambda: product_dissimilarity(x_BD, row_ND), near(1e-5), rounds=9)


def clustering(
    count: int, clusters: int, how: Literal["exact", "sample", "warm"] = "exact", restarts: int = 5
) -> Comparison:
    """UCDIR's K-means of an epoch, restarts of 20 iterations; ours as exactly, or by ``kmeans_sample`` or
    ``kmeans_warm`` from clusters of features that have moved since."""
    generator = torch.Generator().manual_seed(0)
    centre_KD = unit(2 * clusters, 1)
    drawn = centre_KD[torch.randint(2 * clusters, (count,), generator=generator)]
    before = F.normalize(drawn + 0.08 * torch.randn(count, D, generator=generator), dim=1)
    x = F.normalize(before + 0.02 * torch.randn(count, D, generator=generator), dim=1)
    options: dict[str, Any] = {"iterations": 20, "restarts": restarts, "seed": 0, "max_points": 2000}
    if how == "warm":
        label_N = kmeans(before, clusters, **options).label_N

    def official() -> Tensor:
        faiss.omp_set_num_threads(1)
        run = faiss.Clustering(D, clusters)
        run.niter, run.nredo, run.seed, run.max_points_per_centroid = 20, restarts, 0, 2000
        index = faiss.IndexFlatL2(D)
        run.train(x.numpy(), index)
        index.search(x.numpy(), 1)
        centroid = faiss.vector_to_array(run.centroids).reshape(clusters, D)
        return F.normalize(torch.from_numpy(centroid), dim=1)

    def ours() -> Tensor:
        faiss.omp_set_num_threads(1)
        more: dict[str, Any] = {}
        if how == "sample":
            more = {"sample": 128, "settled": SETTLED}
        if how == "warm":
            more = {"initial_KD": cluster_means(x, label_N, clusters), "settled": SETTLED}
        return kmeans(x, clusters, **options, **more).centroid_KD

    def inertia(centroid_KD: Tensor) -> float:
        index = faiss.IndexFlatL2(D)
        index.add(centroid_KD.numpy())
        return float(index.search(x.numpy(), 1)[0].sum())

    def same(one: Tensor, other: Tensor) -> str:
        share = inertia(other) / inertia(one)
        assert share <= 1.02, f"inertia {share:.3f} of the official one"
        return f"inertia {share:.3f} of the official one"

    return Comparison(
        f"K-means, {count} x {clusters}, restarts {restarts}, {how}", official, ours, same, rounds=3
    )


def evaluation(count: int, official_queries: int = 256, queries: int = 2048) -> Comparison:
    """P@50/100/200 and, ours alone, mAP@All, of queries against a gallery of ``count``."""
    generator = torch.Generator().manual_seed(0)
    classes = 65
    centre_KD = unit(classes, 1)
    label_N = torch.randint(classes, (count,), generator=generator)
    gallery = F.normalize(centre_KD[label_N] + 0.15 * torch.randn(count, D, generator=generator), dim=1)
    label_Q = torch.randint(classes, (queries,), generator=generator)
    query = F.normalize(centre_KD[label_Q] + 0.15 * torch.randn(queries, D, generator=generator), dim=1)
    names_N, names_Q = (np.array([f"class {label}" for label in x.tolist()]) for x in (label_N, label_Q))
    cutoffs = (50, 100, 200)

    def official(used: int = official_queries) -> list[float]:
        similarity = cosine_similarity(query[:used].numpy(), gallery.numpy())
        order = np.argsort(similarity, axis=1)[:, ::-1]
        ranked = label_N.numpy()[order.flatten()].reshape(order.shape)
        out = []
        for k in cutoffs:
            hits, shown = 0, 0
            for row, label in zip(ranked, label_Q[:used].tolist(), strict=True):
                most = min(k, int((label_N.numpy() == label).sum()))
                hits += int((row[:most] == label).sum())
                shown += most
            out.append(100 * hits / shown)
        return out

    def ours(used: int = queries) -> list[float]:
        ranking = rank(query[:used], gallery, names_Q[:used].tolist(), names_N.tolist())
        float(average_precision(ranking).mean())
        return [precision_at(ranking, k=k) for k in cutoffs]

    def same(one: list[float], _: list[float]) -> str:
        return near(1e-3)(one, ours(official_queries))

    share = official_queries / queries
    name = f"P@K (ours: and mAP@All) of {queries} queries, gallery of {count}"
    return Comparison(name, official, ours, same, rounds=3, share=share)


def embedding(trunk: str, side: int) -> Comparison:
    """A frozen trunk's features of 32 views: torch against what `embed` runs."""
    params = EncoderParams(trunk={"timm": trunk}, feature_dim=16, head="residual")
    encoder = new_encoder(params, 0).eval()
    fast, reason = compiled(encoder, side)
    assert not reason, reason
    x = torch.randn(CHUNK, 3, side, side)

    def through(arm: Any) -> Callable[[], tuple[Tensor]]:
        return lambda: (pooled_features(arm, x),)  # type: ignore[no-untyped-call]

    name = f"{CHUNK} views of {side} px through {trunk}"
    return Comparison(name, through(encoder), through(fast), near(1e-4), rounds=11)


def whole_epoch(
    side: int, count: int = 128, precision: Literal["float32", "bfloat16"] = "float32"
) -> Comparison:
    """UCDIR's epoch on a pair, ResNet-18: views, both encoders, losses, update, and the features of all.

    The official arm is one process that does what its loader, model and loop do, with our losses' values; it
    takes features twice, before and after an epoch. Its precision is float32, ours as said.
    """
    torch.manual_seed(0)
    data = photos(2 * count)
    stored, sizes = packed(2 * count, 96)
    halves = (slice(0, count), slice(count, 2 * count))
    images = tuple(
        DomainImages(name, stored[rows].numpy(), np.arange(count), sizes[rows].numpy())
        for name, rows in zip("ab", halves, strict=True)
    )
    method_type = METHODS["ucdir"]
    params = method_type.params_type(clusters=7, batch_size=B, epochs=200)  # type: ignore[call-arg]
    encoder = EncoderParams(trunk={"torchvision": "resnet18"}, feature_dim=D, precision=precision)
    view = ViewParams(side=side)
    training = Training(images, view, encoder, None, method_type(params, 0), torch.device("cpu"))  # type: ignore[arg-type]
    training.begin()
    training.method.start(training.features())
    epoch = iter(range(10**6))

    query, key = (OfficialNetwork() for _ in range(2))
    key.load_state_dict(query.state_dict())
    optimizer = torch.optim.SGD(query.parameters(), 2e-4, momentum=0.9, weight_decay=1e-4)
    transform, still = aug_plus(side), plain(side)
    banks = [unit(count, 1), unit(count, 2)]

    def pass_over() -> list[Tensor]:
        key.eval()
        with torch.no_grad():
            out = [
                torch.cat(
                    [key(torch.stack([still(opened(d)) for d in part])) for part in _batches(data[rows])]
                )
                for rows in halves
            ]
        key.train()
        return out

    def official() -> int:
        pass_over()
        order = torch.randperm(count).tolist()
        for slots in _batches(order):
            pictures = [opened(data[half.start + slot]) for half in halves for slot in slots]
            q_views, k_views = (torch.stack([transform(p) for p in pictures]) for _ in range(2))
            with torch.no_grad():
                for mine, theirs in zip(key.parameters(), query.parameters(), strict=True):
                    mine.data = mine.data * 0.999 + theirs.data * 0.001
                keys = key(k_views)
            q = query(q_views)
            loss = torch.zeros(())
            for number, bank in enumerate(banks):
                rows = slice(number * len(slots), (number + 1) * len(slots))
                bank[slots] = keys[rows]
                logits = q[rows] @ bank.clone().T / 0.2
                loss = loss + F.cross_entropy(logits, torch.tensor(slots))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            float(loss.detach())
        pass_over()
        return count

    def ours() -> int:
        training.train_epoch(next(epoch) % params.epochs)
        training.features()
        return count

    def same(one: int, other: int) -> str:
        assert one == other
        return "the same pictures, views, networks and passes"

    name = f"UCDIR epoch, 2 x {count} pictures, {side} px, ResNet-18, ours in {precision}"
    return Comparison(name, official, ours, same, 3)


class OfficialNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = resnet18(num_classes=D)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.trunk(x), dim=1)


def _batches(items: list[Any]) -> list[list[Any]]:
    return [items[first : first + B] for first in range(0, len(items), B)]
