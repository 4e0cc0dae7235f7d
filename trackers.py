"""Where else a run's figures are logged: TensorBoard, Weights & Biases, MLflow; each is imported if it is asked for."""

import re

from errors import UserError


def open_trackers(folder, s):
    """-> [function of {name: value} and a step], one for each tracker that was asked for. Raises UserError."""
    trackers = []
    for name, open_tracker in (("tensorboard", to_tensorboard), ("wandb", to_wandb), ("mlflow", to_mlflow)):
        if getattr(s, name):
            try:
                trackers.append(open_tracker(folder, vars(s)))
            except ImportError:
                raise UserError(f"--{name}: {name} is not installed; pip install {name}") from None
            except Exception as error:  # no server, no account: they raise many kinds
                raise UserError(f"--{name}: {type(error).__name__}: {error}") from None
    return trackers


def to_tensorboard(folder, config):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(scalars, step):
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def to_wandb(folder, config):
    import wandb

    run = wandb.init(dir=str(folder), name=folder.name, config=config)
    return lambda scalars, step: run.log(scalars, step=step)


def to_mlflow(folder, config):
    import mlflow

    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({key: str(value)[:250] for key, value in config.items()})

    def log(scalars, step):
        mlflow.log_metrics({re.sub(r"[^\w./ -]", "_", name): value for name, value in scalars.items()}, step=step)

    return log


def scalars_of(row):
    """A line of log.jsonl -> {name: value} for trackers."""
    scalars = {f"losses/{name.removeprefix('loss_')}": value for name, value in row["losses"].items()}
    for name, value in row.items():
        if name.startswith(("AP", "AR", "class/")) and value >= 0:
            scalars[f"validation/{name}"] = value
    return scalars | {"lr": row["lr"], "loss": sum(row["losses"].values())}
