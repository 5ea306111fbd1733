"""`aml robustness`."""

from __future__ import annotations

import argparse
from pathlib import Path

from aml.commands.options import FEWER_AT_ONCE, add_checkpoint

ABOUT = "Evaluate a checkpoint on disturbed photographs: seven kinds, five severities; table and plot."
TAKES_SETTINGS = True
MEMORY_REMEDY = FEWER_AT_ONCE
EPILOG = """\
36 evaluations. A call that is interrupted is simply repeated: what is finished is not done again.

  aml robustness --checkpoint runs/first --split val
  torchrun --nproc-per-node 4 -m aml robustness --checkpoint runs/first --split testA
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml robustness --checkpoint DIR [--data DIR] [--split SPLIT] [section.name=value ...]"
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument("--data", metavar="DIR", help="folder of the data; default: that of the training")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--out", metavar="DIR", help="default: a folder beside the evaluations of aml eval")


def run(options: argparse.Namespace) -> int:
    from aml import ranks, robustness, stored
    from aml.files import require_writable, write_json, write_whole
    from aml.trained import open_trained

    with ranks.joined() as team:
        subject = open_trained(options.checkpoint, options.data, options.settings, team.device)
        place = f"robustness-{stored.name_of(subject.annotations.name, options.split)}"
        out = Path(options.out) if options.out else stored.folder_of(subject.folder) / place
        clean = subject.dataset(options.split)
        datasets = {name: clean.disturbed(perturb) for name, perturb in robustness.conditions()}
        evaluations = {}
        if team.is_main:
            require_writable(out)
            for name, dataset in datasets.items():
                found = robustness.already_done(out / f"{name}.json", subject.identity(dataset))
                if found is not None:
                    evaluations[name] = found
        todo = team.as_on_main([name for name in datasets if name not in evaluations])
        for number, name in enumerate(todo, start=1):
            evaluation = subject.evaluate(datasets[name], team, judge_map=False)
            if evaluation is not None:
                stored.save(out, evaluation, name)
                evaluations[name] = evaluation
                print(f"{number}/{len(todo)}  {name:<12} mIoU {evaluation['metrics']['mIoU']:.4f}", flush=True)
        if team.is_main:
            results = robustness.summary({name: evaluations[name] for name in datasets})
            write_json(out / "results.json", results)
            text = robustness.markdown(results)
            write_whole(out / "robustness.md", text)
            robustness.draw(out / "robustness.png", results)
            print(f"\n{text}\nwrote {out / 'robustness.md'}")
    return 0
