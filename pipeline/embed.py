"""DVC stage `embed@<dataset>`: features of the frozen trunk, where the head alone is trained."""

from __future__ import annotations

from ucir.cluster.launch import embed_on_cluster
from ucir.data.feature_pack import FeaturePackInfo
from ucir.devices import choose_device
from ucir.errors import run_main, stage_item
from ucir.models.embedding import embed, embed_here
from ucir.paths import FEATURES, check_writable, file_sha256, unshare
from ucir.progress import Progress
from ucir.runs.run import embedder_of, embedding_key
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    dataset = stage_item(params.datasets)
    block = params.datasets[dataset]
    out = FEATURES / dataset
    check_writable(out)
    unshare(out)
    if block.start.trained != "head":
        FeaturePackInfo("", 0, 0, {}).write(out)
        print(f"embed: nothing to do, as the trunk is trained (datasets.{dataset}.start.trained)")
        return
    embedder = embedder_of(block, dataset, choose_device(params.cluster))
    digest = file_sha256(embedder.start)
    compute = embed_on_cluster(params.cluster) if params.cluster.num_workers else embed_here
    with Progress("embed", 0, "picture") as progress:
        info = embed(embedder, out, embedding_key(block, digest), compute, progress.reach)
    print(
        f"embed: {sum(info.counts.values())} pictures, plain and in {info.views} random views, "
        f"{info.pooled_dim} features each, in {out}"
    )


if __name__ == "__main__":
    run_main(main)
