"""README.md, the model card in a run's folder: what was trained, its scores, how to use it and how to repeat it.

Its front matter is what the Hugging Face hub reads. Its commands are for the directory in which the run was started.
"""

import logging
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pats_jax.core import files
from pats_jax.reporting.console import visible
from pats_jax.reporting.report_page import markdown_code, markdown_image, markdown_text
from pats_jax.run import card_use

if TYPE_CHECKING:  # takes a while to import, and only a run that ends writes a card
    from huggingface_hub import EvalResult, ModelCardData

logger = logging.getLogger(__name__)

_GLUE = "nyu-mll/glue"
_CLASSIFICATION = "text-classification"  # the hub's name for what all programs train but text2text
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# Chosen by the run itself where they are unset, or no setting of the training.
_NOT_CHANGED_BY_HAND = ("output_dir", "train_batch_size", "length_buckets", "sensitivity_batches", "layers", "unroll")

Values = Mapping[str, Any]  # of settings, or of results.json


def write_fine_tuned(
    folder: pathlib.Path, settings: Values, results: Values, defaults: Values | None = None, program: str = "glue"
) -> None:
    """Writes the card of a `pats-jax glue`, `pats-jax train` or `pats-jax text2text` run.

    Args:
      folder: the run's folder, with the saved model.
      settings: all settings, by name.
      results: the content of results.json.
      defaults: the program's own settings; the card shows those that differ. None: it shows all.
      program: its subcommand.
    """
    from huggingface_hub import ModelCardData

    method = markdown_code(f"--method {results['method']}")
    if results.get("peft"):
        share = ""
        if "trained_parameters" in results:
            share = f" ({results['trained_parameters']} of {results['num_parameters']} parameters)"
        method = f"{markdown_code('--peft ' + results['peft'])}{share} and {method}"
    lines = [
        f"# {markdown_text(results['model_name_or_path'])} fine-tuned on {markdown_text(results['data'])}",
        "",
        f"Trained by `pats-jax {program}` with {method}, seed {results['seed']}"
        + (f", {results['steps']} steps." if "steps" in results else "."),
        "",
        *_score_table(results),
        *_out_of_domain_table(results),
        "",
        "## Use",
        "",
        *card_use.of_folder(folder, results),
    ]
    data = ModelCardData(
        base_model=_hub_id(results["model_name_or_path"]),
        license=_license(results["model_name_or_path"]),
        library_name=_library(results, card_use.is_whole(folder, results)),
        pipeline_tag=results.get("pipeline_tag", _CLASSIFICATION),
        tags=_tags(results, "fine-tuned"),
        datasets=[_GLUE] if _is_glue(settings) else None,
        model_name=visible(folder.name),
        eval_results=_eval_results(settings, results),
    )
    _write(folder, program, data, lines, _changed(settings, defaults), results)


def write_primed(folder: pathlib.Path, settings: Values, results: Values, defaults: Values | None = None) -> None:
    """Writes the card of a `pats-jax prime` run; arguments as in `write_fine_tuned`."""
    from huggingface_hub import ModelCardData

    base, kind = results["model_name_or_path"], results["peft"]
    tasks = ", ".join(map(markdown_text, results["upstream_tasks"]))
    what = {"plm": "the model", "pe": f"the adapter ({kind})", "plm+pe": f"the model and the adapter ({kind})"}
    method = markdown_code(f"--method {results['method']}")
    flags = markdown_code(f"--algorithm {results['algorithm']} --train {results['train']} --head {results['head']}")
    lines = [
        f"# {markdown_text(base)} primed on {len(results['upstream_tasks'])} few-shot tasks",
        "",
        f"Trained by `pats-jax prime` with {flags} and {method}: {what[results['train']]}, "
        f"{results['trained_parameters']} of {results['num_parameters']} parameters, seed {results['seed']}, "
        f"{results['steps']} steps, on {markdown_text(results['data_dir'])}: {tasks}.",
        "",
        *_dev_table(results),
        "",
        "## Use",
        "",
        card_use.HERE,
        "",
        card_use.command(
            f"pats-jax gym --primed {card_use.word(str(folder))} --kinds {kind or 'lora'} --head {results['head']} \\",
            f"  --model_name_or_path {card_use.word(base)} --data_dir {card_use.word(results['data_dir'])} "
            f"--partition {card_use.word(settings['partition'])} \\",
            f"  --output_dir {card_use.word(f'{folder}-gym')}",
        ),
    ]
    if (folder / "model").exists():
        loader = "from_pretrained_seq2seq" if results["head"] in ("generate", "likelihood") else "from_pretrained"
        lines += ["", f"The folder `model/` also loads with `pats_jax.models.{loader}` and Transformers (torch)."]
    if (folder / "adapter").exists():
        lines += ["", "The folder `adapter/` contains the adapter; `pats_jax.models.peft.load_peft` loads it."]
    data = ModelCardData(
        base_model=_hub_id(base), license=_license(base), tags=[*_tags(results, "primed"), str(results["algorithm"])]
    )
    _write(folder, "prime", data, lines, _changed(settings, defaults), results)


def for_hub(
    repo_id: str, settings: Values, results: Values, defaults: Values, *, whole: bool, paths: Collection[str] = ()
) -> str:
    """The card of a model as a repository of the hub: without paths of this machine.

    Args:
      repo_id: the repository, ``USER/NAME``.
      settings: all settings of the run, by name.
      results: what results.json holds, or as much of it as is known: at least the model, the method and the versions.
      defaults: the program's own settings; the card shows those that differ.
      whole: whether the repository holds a whole model, not only an adapter.
      paths: the settings that name files or folders.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, primed = str(results["model_name_or_path"]), "upstream_tasks" in results
    results = {**results, "model_name_or_path": pathlib.Path(base).name, "data": _public_data(settings)}
    what = (
        f"primed on {len(results['upstream_tasks'])} few-shot tasks" if primed else f"fine-tuned on {results['data']}"
    )
    peft = f"{markdown_code('--peft ' + results['peft'])} and " if results.get("peft") else ""
    more = [f"{name} {results[name]}" for name in ("seed", "steps") if name in results]
    lines = [
        f"# {markdown_text(repo_id.split('/')[-1])}",
        "",
        f"{markdown_text(_hub_id(base) or pathlib.Path(base).name)} {markdown_text(what)}, by pats-jax with {peft}"
        f"{markdown_code('--method ' + results['method'])}{''.join(f', {one}' for one in more)}.",
        "",
        *(_dev_table(results) if primed else _score_table(results)),
        "",
        "## Use",
        "",
        *card_use.from_hub(repo_id, results, whole, primed),
        "",
        *_settings_table({name: one for name, one in _changed(settings, defaults).items() if name not in paths}),
        "",
        _versions(results),
    ]
    data = ModelCardData(
        base_model=_hub_id(base),
        license=_license(base),
        library_name=_library(results, whole),
        pipeline_tag=None if primed else results.get("pipeline_tag", _CLASSIFICATION),
        tags=_tags(results, "primed" if primed else "fine-tuned"),
        datasets=[_GLUE] if _is_glue(settings) else None,
        model_name=visible(repo_id.split("/")[-1]),
        eval_results=None if primed else _eval_results(settings, results),
    )
    text = "\n".join(lines)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _public_data(settings: Values) -> str:
    """The data by name, without folders of this machine."""
    if settings.get("task_name"):
        generated = settings.get("data_dir") == "builtin"
        return f"generated data in the form of {settings['task_name']}" if generated else str(settings["task_name"])
    name = str(settings.get("dataset_name") or "")
    is_of_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not pathlib.Path(name).exists()
    return name if is_of_hub else "own data"


def _changed(settings: Values, defaults: Values | None) -> dict[str, object]:
    """The settings that differ from the defaults."""
    given = {name: value for name, value in settings.items() if value is not None}
    if defaults is None:
        return given
    kept = (name for name in given if name not in _NOT_CHANGED_BY_HAND)
    return {name: given[name] for name in kept if given[name] != defaults.get(name)}


def _write(
    folder: pathlib.Path,
    program: str,
    data: "ModelCardData",
    lines: Sequence[str],
    changed: Mapping[str, object],
    results: Values,
) -> None:
    """Writes the card: front matter, the given lines, how to repeat the run, and its plots."""
    from huggingface_hub import ModelCard

    lines = [
        *lines,
        "",
        "## Repeat",
        "",
        card_use.command(
            f"pats-jax {program} --config {card_use.word(f'{folder}/config.json')} "
            f"--output_dir {card_use.word(f'{folder}-again')}"
        ),
        "",
        *_settings_table(changed),
        "",
        _versions(results),
    ]
    plots = sorted((folder / "plots").glob("*.png"))
    if plots:
        lines += ["", "## Plots", "", *(markdown_image(path.stem, f"plots/{path.name}") for path in plots)]
    text = "\n".join(lines)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    files.write_text(folder / "README.md", str(card))


def _settings_table(changed: Mapping[str, object]) -> list[str]:
    return [
        "Settings other than the defaults:",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {markdown_text(name)} | {markdown_code(value)} |" for name, value in changed.items()),
    ]


def _versions(results: Values) -> str:
    return "Made with " + ", ".join(markdown_text(f"{name} {one}") for name, one in results["versions"].items()) + "."


# front matter


def _library(results: Values, whole: bool) -> str | None:
    """The library that the hub's page tells people to load it with."""
    return "transformers" if whole else "peft" if card_use.is_in_pefts_format(results) else None


def _is_glue(settings: Values) -> bool:
    """Whether the run read the hub's GLUE."""
    return bool(settings.get("task_name")) and settings.get("data_dir") is None


def _hub_id(name: str) -> str | None:
    """The model's name if it is that of a hub repository."""
    return name if _HUB_ID.fullmatch(name) and not pathlib.Path(name).exists() else None


def _license(name: str) -> str | None:
    """The license that the base model's own card names, if the card is on this machine."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "README.md") if _hub_id(name) else f"{name}/README.md"
    if not isinstance(found, str) or not pathlib.Path(found).is_file():
        return None
    try:
        return huggingface_hub.ModelCard.load(found, ignore_metadata_errors=True).data.license
    except Exception as error:  # whatever the parsers of a stranger's file raise: its license is then not known
        logger.debug("%s: %s", found, error)
        return None


def _tags(results: Values, kind: str) -> list[str]:
    peft = [results["peft"]] if results.get("peft") else []
    return [visible(tag) for tag in ("pats-jax", "jax", kind, *results["method"].split("+"), *peft)]


def _eval_results(settings: Values, results: Values) -> "list[EvalResult] | None":
    """The validation scores of the model that the run kept."""
    from huggingface_hub import EvalResult

    if "final" not in results:
        return None
    final = results["final"]
    kept = final if results.get("model_step", final.get("step")) == final.get("step") else results["best"]
    task = settings.get("task_name") or "own data"
    return [
        EvalResult(
            task_type=results.get("pipeline_tag", _CLASSIFICATION),
            dataset_type=_GLUE if _is_glue(settings) else "other",
            dataset_name=visible(results["data"]),
            dataset_config=visible(task) if settings.get("task_name") else None,
            dataset_split="validation",
            metric_type=visible(name),
            metric_value=value,
        )
        for name, value in kept["metrics"].items()
    ]


# sections


def _score_table(results: Values) -> list[str]:
    if "final" not in results:
        return ["Not evaluated."]
    names = list(results["final"]["metrics"])
    titles = {"best": "best", "final": "final", "majority_class": "majority class", "test": "model here, test rows"}
    rows = [(title, results[name]) for name, title in titles.items() if name in results]
    return [
        f"Scores on {results['eval_examples']} validation rows (the best by {markdown_text(results['main_metric'])}):",
        "",
        "| | " + " | ".join(map(markdown_text, names)) + " |",
        "| --- |" + " --- |" * len(names),
        *(f"| {title} | " + " | ".join(f"{row['metrics'][n]:.4f}" for n in names) + " |" for title, row in rows),
        *_interval_line(results.get("diagnosis")),
    ]


def _interval_line(diagnosis: Values | None) -> list[str]:
    if not diagnosis:
        return []
    interval, metric = diagnosis["interval"], markdown_text(diagnosis["metric"])
    what = f"{metric} of the model in this folder is {diagnosis['score']:.4f}"
    if interval["low"] == interval["high"]:
        return ["", f"{what}; there is no bootstrap interval, for all resamples of the rows have the same score."]
    return ["", f"{what}, {interval['level']:.0%} bootstrap interval {interval['low']:.4f} to {interval['high']:.4f}."]


def _dev_table(results: Values) -> list[str]:
    if "final" not in results:
        return ["Not evaluated on dev tasks."]
    (name,) = results["final"]["metrics"]
    rows = [(title, results[title]["step"], results[title]["metrics"][name]) for title in ("best", "final")]
    table = [f"| {title} | {step} | {score:.4f} |" for title, step, score in rows]
    return [f"| dev tasks | step | {name} |", "| --- | ---: | ---: |", *table]


def _out_of_domain_table(results: Values) -> list[str]:
    if "out_of_domain" not in results:
        return []
    return [
        "",
        "Out-of-domain scores of the model in this folder:",
        "",
        "| set | rows | accuracy |",
        "| --- | --- | --- |",
        *(
            f"| {markdown_text(name)} | {scores['examples']} | {scores['metrics']['accuracy']:.4f} |"
            for name, scores in results["out_of_domain"].items()
        ),
    ]
