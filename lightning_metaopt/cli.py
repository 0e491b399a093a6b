"""``lightning-metaopt``: recipes from the command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

RECIPE_HELP = """A recipe is a YAML file; give several and later ones are laid over earlier ones. Every option of a recipe
can be set with --a.b=c, for example --evaluation.init_args.steps=50 or --seeds=[0,1]; --print_config shows the result and stops."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for anything wrong with the call or the recipe, 1 for a study whose workers
    or methods failed, 130 for one that was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["lightning-metaopt", *arguments])
    arguments, overrides = _split_overrides(arguments)
    print_config = "--print_config" in arguments  # the parser has a flag of that name for itself
    options = _parser().parse_args([argument for argument in arguments if argument != "--print_config"])
    from lightning_metaopt.storage import RuleFileError
    from lightning_metaopt.study.components import RecipeError, StudyError

    try:
        if print_config:
            return _print_config(options[options.subcommand], overrides)
        _COMMANDS[options.subcommand](options[options.subcommand], overrides, command)
    except (RecipeError, RuleFileError, FileNotFoundError, ImportError) as error:  # data or a package that is not there
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what a study had finished is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    from lightning_metaopt.data.command import add_data_command

    parser = ArgumentParser(prog="lightning-metaopt", description="Meta-train, evaluate and compare learned optimizers.")
    commands = parser.add_subcommands(required=True)

    def command(name: str, help_text: str, recipe: bool = True) -> Any:
        sub = ArgumentParser(description=f"{help_text} {RECIPE_HELP}" if recipe else help_text)
        if recipe:
            sub.add_argument("recipe", nargs="*", type=str, help="recipe files")
            sub.add_argument("--config", action="append", type=str, help="a recipe file; may be repeated")
        commands.add_subcommand(name, sub, help=help_text)
        return sub

    run = command("run", "Carry out a whole recipe: meta-train, tune, compare, table and plot.")
    run.add_argument("--output", type=str | None, default=None, help="folder for the results (default: outputs/<recipe>)")
    run.add_argument("--overwrite", action="store_true", help="replace existing results")
    run.add_argument("--extend", action="store_true", help="go on with a recipe that has changed; runs that are the same are kept")
    run.add_argument("--workers", type=int, default=1, help="processes on this machine")
    run.add_argument("--storage", type=str | None, default=None, help="database URL, for workers on several machines")
    train = command("meta-train", "Meta-train the rule of one method and save it.")
    train.add_argument("--method", type=str | None, default=None, help="a method of the recipe (default: the first with 'train')")
    train.add_argument("--problem", type=str | None, default=None, help="a problem of the recipe (default: its first)")
    train.add_argument("--seed", type=int, default=0, help="seed of the meta-training")
    train.add_argument("--output", type=str, default="rule.safetensors", help="the rule file to write")
    train.add_argument("--overwrite", action="store_true", help="replace an existing file")
    evaluate = command("evaluate", "Evaluate a saved rule on a recipe's problems.")
    evaluate.add_argument("--rule", type=str, required=True, help="a rule file, or the name of a shipped rule")
    evaluate.add_argument("--problem", type=str | None, default=None, help="a problem of the recipe (default: its first)")
    compare = command("compare", "One table of the results in several output folders.", recipe=False)
    compare.add_argument("outputs", nargs="+", type=str, help="output folders of finished runs")
    compare.add_argument("--output", type=str | None, default=None, help="folder for joined tables, figures and page")
    plot = command("plot", "Make the summary, figures and page of a finished run again from its tables.", recipe=False)
    plot.add_argument("folder", type=str, help="output folder of a finished run")
    command("list", "List rules, task families, meta-gradients, objectives, meta-trained rules and recipes.", recipe=False)
    add_data_command(commands)
    return parser


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take ``--a.b=c`` and ``--a.b c`` out where ``a`` is a key of recipes."""
    from lightning_metaopt.study.spec import KEYS

    rest: list[str] = []
    overrides: dict[str, str] = {}
    pending: str | None = None
    for argument in arguments:
        if pending is not None:
            overrides[pending], pending = argument, None
        elif argument.startswith("--") and argument[2:].split("=")[0].split(".")[0] in KEYS:
            key, equals, value = argument[2:].partition("=")
            if equals:
                overrides[key] = value
            else:
                pending = key
        else:
            rest.append(argument)
    if pending is not None:
        rest.append(f"--{pending}")  # without a value: let the parser complain
    return rest, overrides


def _recipe(options: Any, overrides: dict[str, str], text_only: bool = False) -> tuple[Any, Path]:
    from lightning_metaopt.study.components import RecipeError
    from lightning_metaopt.study.spec import load_recipe

    paths = [*options.recipe, *(options.config or [])]
    if not paths:
        raise RecipeError("no recipe given; for example: lightning-metaopt run recipes/quickstart/digits.yaml")
    return load_recipe(paths, overrides, text_only), Path(paths[0])


def _print_config(options: Any, overrides: dict[str, str]) -> int:
    import yaml

    recipe, _ = _recipe(options, overrides, text_only=True)
    print(yaml.safe_dump(recipe.source, sort_keys=False, allow_unicode=True), end="")
    return 0


def _problem(recipe: Any, name: str | None) -> Any:
    from lightning_metaopt.study.components import RecipeError

    if name is None:
        return next(iter(recipe.problems.values()))
    if name not in recipe.problems:
        raise RecipeError(f"the recipe has no problem {name!r}; it has {', '.join(recipe.problems)}")
    return recipe.problems[name]


def _run(options: Any, overrides: dict[str, str], command: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from lightning_metaopt.study.components import RecipeError, StudyError
    from lightning_metaopt.study.progress import quiet_lightning
    from lightning_metaopt.study.records import failures
    from lightning_metaopt.study.report import summary_text, write_results
    from lightning_metaopt.study.tidy import StudyData
    from lightning_metaopt.study.workers import prepare_folder, run_recipe

    recipe, path = _recipe(options, overrides)
    if options.workers < 1:
        raise RecipeError(f"--workers must be at least 1, got {options.workers}")
    output = Path(options.output or Path("outputs") / path.stem)
    prepare_folder(output, recipe, options.overwrite, options.extend)
    quiet_lightning()
    results = run_recipe(recipe, output, options.storage, options.workers)
    write_results(output, recipe, results, command)
    console = Console()
    console.print(Markdown(summary_text(StudyData.read(output), brief=True)))
    console.print(f"Page: {output / 'index.html'}   table: {output / 'summary.md'}   rules: {output / 'rules'}")
    failed = {recipe.problems[problem].title(name): error for (problem, name), error in failures(results).items()}
    if failed:
        raise StudyError(
            f"failed, and not in the tables: {'; '.join(f'{title}: {error}' for title, error in failed.items())}. The same command "
            "tries again. If the recipe is to blame, mend it, or take the method out, and add --extend: what is finished is kept"
        )


def _meta_train(options: Any, overrides: dict[str, str], command: str) -> None:
    from lightning_metaopt.storage import save_rule
    from lightning_metaopt.study.components import RecipeError
    from lightning_metaopt.study.progress import Progress, quiet_lightning
    from lightning_metaopt.study.run import train_rule

    recipe, _ = _recipe(options, overrides)
    trained = [name for name, method in recipe.methods.items() if method.train is not None]
    name = options.method or (trained[0] if trained else None)
    if name is None or name not in trained:
        raise RecipeError(f"no method {name!r} with 'train' in the recipe; there are: {', '.join(trained) or 'none'}")
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise RecipeError(f"{output} exists; choose another --output, or pass --overwrite to replace it")
    problem = _problem(recipe, options.problem)
    quiet_lightning()
    method = recipe.methods[name].on(problem.name)
    trial = method.space.grid()[0]
    progress = Progress(1)
    with progress.shown():
        rule, cost = train_rule(method.candidate(problem.family, trial), options.seed, progress, name)
        progress.finished(1)
    assert rule is not None
    provenance = {"recipe": recipe.title, "method": name, "options": trial, "seed": options.seed, "command": command}
    save_rule(rule, output, provenance)
    spent = f"{cost.gradient_evaluations:.3g} gradient evaluations, {cost.seconds:.1f} s"
    progress.console.print(f"{output}: {rule.describe()}  ({spent})")


def _evaluate(options: Any, overrides: dict[str, str], command: str) -> None:
    import statistics

    from rich.console import Console
    from rich.markdown import Markdown

    from lightning_metaopt.storage import load_rule
    from lightning_metaopt.study.evaluation import Candidate
    from lightning_metaopt.study.progress import quiet_lightning
    from lightning_metaopt.study.report import figure, table

    recipe, _ = _recipe(options, overrides)
    problem = _problem(recipe, options.problem)
    rule = load_rule(options.rule)
    quiet_lightning()
    candidate = Candidate(rule=lambda: rule)
    runs = [problem.evaluation.run(problem.family, candidate, rule, seed, "test") for seed in recipe.seeds]
    rows = []
    for metric in runs[0].scores:
        values = [run.scores[metric] for run in runs]
        rows.append([metric, figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan"))])
    Console().print(Markdown("\n".join([f"# {recipe.title}: {options.rule}", "", *table(["metric", "mean ± sd"], rows)])))


def _compare(options: Any, overrides: dict[str, str], command: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from lightning_metaopt.study.components import RecipeError
    from lightning_metaopt.study.report import compare_outputs

    output = Path(options.output) if options.output else None
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output} exists; choose another --output")
    Console().print(Markdown(compare_outputs([Path(folder) for folder in options.outputs], output)))


def _plot(options: Any, overrides: dict[str, str], command: str) -> None:
    from lightning_metaopt.study.report import redraw

    redraw(Path(options.folder))
    print(Path(options.folder) / "index.html")


def _list(options: Any, overrides: dict[str, str], command: str) -> None:
    import inspect

    import lightning_metaopt as lmo
    from lightning_metaopt.rules import Constraint
    from lightning_metaopt.storage import shipped_rules

    listed: list[tuple[str, Any, type]] = [
        ("rules", lmo.rules, lmo.Rule),
        ("constraints", lmo.rules, Constraint),
        ("task families", lmo.tasks, lmo.TaskFamily),
        ("meta-gradients", lmo.metagrads, lmo.MetaGradient),
    ]
    for heading, module, kind in listed:
        classes = {name: getattr(module, name) for name in module.__all__}
        final = {name: found for name, found in classes.items() if inspect.isclass(found) and not inspect.isabstract(found)}
        usable = [name for name, found in final.items() if issubclass(found, kind)]
        print(f"{heading}: {', '.join(usable)}")
    print(f"objectives: {', '.join(lmo.objectives.PRESETS)}")
    print(f"meta-trained rules: {', '.join(shipped_rules())}")
    recipes = sorted(str(path) for path in Path("recipes").glob("*/*.yaml"))
    print(f"recipes: {', '.join(recipes) or 'none below ./recipes'}")


def _data(options: Any, overrides: dict[str, str], command: str) -> None:
    from lightning_metaopt.data.command import run_data
    from lightning_metaopt.data.prepared import SourceError
    from lightning_metaopt.study.components import RecipeError

    try:
        run_data(options)
    except (SourceError, ValueError) as error:
        raise RecipeError(str(error)) from error


_COMMANDS = {
    "run": _run,
    "meta-train": _meta_train,
    "evaluate": _evaluate,
    "compare": _compare,
    "plot": _plot,
    "list": _list,
    "data": _data,
}

if __name__ == "__main__":
    sys.exit(main())
