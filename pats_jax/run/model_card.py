"""README.md, the model card in a run's folder: what was trained, its scores, how to use it and how to repeat it."""

import pathlib
import shlex
from typing import Any

from pats_jax.core import files
from pats_jax.reporting.console import visible
from pats_jax.reporting.report_page import markdown_block, markdown_code, markdown_image, markdown_text

_IN_PEFTS_FORMAT = ("lora", "ia3", "prompt", "prefix")


def write_fine_tuned(folder: pathlib.Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes the card of a `pats-jax glue` run.

    Args:
      folder: the run's folder, with the saved model.
      settings: all settings, by name.
      results: the content of results.json.
    """
    method = markdown_code(f"--method {results['method']}")
    if results.get("peft"):
        share = ""
        if "trained_parameters" in results:
            share = f" ({results['trained_parameters']} of {results['num_parameters']} parameters)"
        method = f"{markdown_code('--peft ' + results['peft'])}{share} and {method}"
    lines = [
        f"# {markdown_text(results['model_name_or_path'])} fine-tuned on {markdown_text(results['data'])}",
        "",
        f"Trained by `pats-jax glue` with {method}, seed {results['seed']}"
        + (f", {results['steps']} steps." if "steps" in results else "."),
        "",
        *_score_table(results),
        *_out_of_domain_table(results),
        "",
        "## Use",
        "",
        *_use(folder, results),
    ]
    _write(folder, "glue", lines, settings, results)


def write_primed(folder: pathlib.Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes the card of a `pats-jax prime` run; arguments as in `write_fine_tuned`."""
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
        *(
            ["| dev tasks | step | accuracy |", "| --- | ---: | ---: |"]
            + [
                f"| {title} | {results[title]['step']} | {results[title]['metrics']['accuracy']:.4f} |"
                for title in ("best", "final")
            ]
            if "final" in results
            else ["Not evaluated on dev tasks."]
        ),
        "",
        "## Use",
        "",
        _command(
            f"pats-jax gym --primed {_word(folder.name)} --kinds {kind or 'lora'} --head {results['head']} \\",
            f"  --model_name_or_path {_word(base)} --data_dir {_word(results['data_dir'])} "
            f"--partition {_word(settings['partition'])} \\",
            "  --output_dir NEW",
        ),
    ]
    if (folder / "model").exists():
        lines += ["", "The folder `model/` also loads with `pats_jax.models.from_pretrained` and Transformers (torch)."]
    if (folder / "adapter").exists():
        lines += ["", "The folder `adapter/` contains the adapter; `pats_jax.models.peft.load_peft` loads it."]
    _write(folder, "prime", lines, settings, results)


def _write(folder, program, lines, settings, results):
    """Writes the card: the given lines, how to repeat the run, and its plots."""
    lines = [
        *lines,
        "",
        "## Repeat",
        "",
        _command(f"pats-jax {program} --config config.json --output_dir NEW"),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(
            f"| {markdown_text(name)} | {markdown_code(value)} |"
            for name, value in settings.items()
            if value is not None
        ),
        "",
        "Made with " + ", ".join(markdown_text(f"{name} {one}") for name, one in results["versions"].items()) + ".",
    ]
    plots = sorted((folder / "plots").glob("*.png"))
    if plots:
        lines += ["", "## Plots", "", *(markdown_image(path.stem, f"plots/{path.name}") for path in plots)]
    files.write_text(folder / "README.md", "\n".join(lines) + "\n")


def _score_table(results):
    if "final" not in results:
        return ["Not evaluated."]
    names = list(results["final"]["metrics"])
    rows = [("best", results["best"]), ("final", results["final"]), ("majority class", results["majority_class"])]
    return [
        f"Scores on {results['eval_examples']} validation rows (the best by {markdown_text(results['main_metric'])}):",
        "",
        "| | " + " | ".join(map(markdown_text, names)) + " |",
        "| --- |" + " --- |" * len(names),
        *(f"| {title} | " + " | ".join(f"{row['metrics'][n]:.4f}" for n in names) + " |" for title, row in rows),
    ]


def _out_of_domain_table(results):
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


def _use(folder, results):
    """How to load the model: whole, or as an adapter for the base model."""
    count, whole = results["num_labels"], (folder / "model").exists() or not results.get("peft")
    part = f"{folder.name}/{'model' if whole else 'adapter'}"
    lines = [_command(f"pats-jax predict {_word(part)} --file texts.tsv")]
    if whole:
        call = f"pats_jax.models.from_pretrained(..., num_labels={count})"
        lines += ["", f"The folder `model/` also loads with `{call}` and with Transformers (torch)."]
    if results.get("peft"):
        lines += [
            "",
            f"The folder `adapter/` contains the adapter ({markdown_text(results['peft'])}) and the head for the base "
            f"model {markdown_text(results['model_name_or_path'])}; `pats_jax.models.peft.load_peft_model` loads both."
            + (" So does PEFT (torch)." if results["peft"] in _IN_PEFTS_FORMAT else ""),
        ]
    return lines


def _command(*lines):
    return markdown_block("\n".join(map(visible, lines)))


def _word(text):
    """A value quoted for the shell; a relative path that looks like a flag gets a leading ``./``."""
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
