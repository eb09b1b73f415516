"""Model cards: what a model was made of, how well it does, and where it should not be used.

In Hugging Face's form: Markdown below a block of YAML that its hub reads. Nothing is looked up there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucir.data.catalogue import FOLDER
from ucir.data.catalogue import entry as catalogue_entry
from ucir.models.model import Model
from ucir.models.pretrained import FREE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

Turns a picture into {{ model.dim }} numbers of unit length. Pictures of the same kind of thing come close
together{% if model.domains %}, across {{ model.domains | join(" and ") }}{% endif %}.

## Use

```
uv run ucir import <this folder> mine
uv run ucir index photos/ --model mine
uv run ucir search --index photos sketch.png
```

## Data
{% if facts.pictures %}
Learnt from unlabelled pictures of {{ facts.dataset }}\
{% if entry %} ({{ entry.title }}; licence of the data: {{ entry.licence }}){% endif %}:
{% for domain, count in facts.pictures.items() %}
- {{ domain }}: {{ count }}
{%- endfor %}

No label was used in training.
{%- if facts.setting and facts.setting != "closed" %} Setting: {{ facts.setting }}.{% endif %}
{% else %}
Not adapted to any pictures.
{% endif %}
## Network

{{ model.encoder.params.trunk_name }} at {{ side }} px, \
{% if model.used == "head" %}{{ model.encoder.params.head }} head{% else %}its pooled features{% endif %}.
{%- if weights %} It began with {{ weights.weights }} (sha256 {{ weights.sha256[:12] }}), licence \
{{ weights.licence }}{% if weights.note %}, {{ weights.note }}{% endif %}.
{%- elif facts.pair %} It began with weights of the same project.
{%- elif facts.params %} It began with random weights.{% endif %}
{% if facts.params %}
## Training

{{ facts.method }}, epoch {{ facts.epoch }} of {{ facts.params.epochs }}, seed {{ facts.seed }}, run \
{{ facts.run_key }}. {{ chosen }}

| key | value |
|---|---|
{%- for key, value in facts.params.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
{% endif %}
## Scores
{% if scores %}
Mean of both directions over the training's own pictures, in percent; labels were read for these numbers\
{% if by_labels %} and for the choice of the epoch{% else %} alone{% endif %}.

| metric | value |
|---|---:|
{%- for name, value in scores.items() %}
| {{ name }} | {{ "%.1f" | format(value) }} |
{%- endfor %}
{% elif not facts.pictures %}
None: it was adapted to no pictures.
{% elif not facts.pair %}
None: it is what trainings begin from. See the study's report.
{% elif facts.setting in ("partial", "open") %}
None here: one training serves partial retrieval in one direction and open in the other. See the study's
report.
{% else %}
None: its pictures have no labels. Look at what it retrieves.
{% endif %}
## Limits

- It knows the kinds of things and the styles that it was trained on; of others it may know little.
- It tells kinds of things apart, not one thing or one person from another.
- A picture of a domain that is not told is taken for one of the nearest domain.
{%- if weights and weights.note %}
- Its network was {{ weights.note }}: their biases are in it.
{%- endif %}
"""
CHOSEN = {
    "last": "The last epoch: nothing was chosen.",
    "best_by_labels": "The epoch was chosen with labels: its scores are better than one can expect without.",
}


def model_card(model: Model) -> ModelCard:
    """The card of a model, from what its file says."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    facts = model.facts
    weights: dict[str, str] = facts.get("weights") or {}
    scores: dict[str, float] = facts.get("scores", {})
    data: dict[str, Any] = {"library_name": "ucir", "pipeline_tag": "image-feature-extraction"}
    licence = weights.get("licence", "")
    if licence in FREE:
        data["license"] = licence
    elif licence:
        data |= {"license": "other", "license_name": licence}
    if scores:
        data["model_name"] = model.name
        data["eval_results"] = [
            EvalResult(
                task_type="image-feature-extraction",
                dataset_type=facts["dataset"],
                dataset_name=f"{facts['dataset']} {facts['pair']}",
                metric_type=name,
                metric_value=round(value, 2),
            )
            for name, value in scores.items()
        ]
    catalogue = facts.get("catalogue", FOLDER)
    choice = facts.get("epoch_choice", "last")
    card: ModelCard = ModelCard.from_template(
        ModelCardData(tags=["image-retrieval", "cross-domain", *model.domains], **data),
        template_str=TEMPLATE,
        title=model.name,
        model=model,
        facts=facts,
        entry=None if catalogue == FOLDER else catalogue_entry(catalogue),
        weights=weights,
        side=model.view.side or model.encoder.form.side,
        scores=scores,
        chosen=CHOSEN[choice],
        by_labels=choice == "best_by_labels",
    )
    return card
