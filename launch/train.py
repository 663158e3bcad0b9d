"""Adapt a model to a longer context, then measure it before and after.

Loads the model, stretches its position encoding (rope), replaces its attention while training, tunes the chosen
parameters on sequences of growing length (curriculum), saves checkpoints, exports a plain Hugging Face folder, and
evaluates the untouched base and the adapted model with the same code.

run_dir receives config.yaml, metrics, checkpoints/, exported/, report.json and pictures. With evaluation=none (the
default) the last three are left out: lctrain export and lctrain evaluate make them later. Continue a stopped run with
the same command and resume=auto.

examples:
  lctrain train experiment=demo run_dir=runs/demo
  lctrain train model.path=<folder or hub id> data=text data.path=<folder> sequence_length=16384 rope=yarn
  lctrain train attention=sliding_window attention.sliding_window=1024 tuning=longlora curriculum=staged
  lctrain train experiment=demo run_dir=runs/short trainer.max_steps=5 logger=csv evaluation=perplexity
  lctrain train experiment=demo run_dir=runs/demo resume=auto
"""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    from lctrain.parallel.cleanup import cleanup
    from lctrain.tracking import finish
    from lctrain.training.run import train

    with cleanup():
        trained = train(cfg)
    exported = None
    if cfg.evaluation and trained.is_global_zero:
        from lctrain.evaluation.run import report_training
        from lctrain.export import export

        exported = export(cfg.run_dir, "auto", f"{cfg.run_dir}/exported")
        before = {"before": cfg.model.path} if "path" in cfg.model else {}
        report_training(cfg, {**before, "after": str(exported)}, trained)
    elif trained.is_global_zero:
        print(f"{trained.steps} steps done; a plain model of them: lctrain export run_dir={cfg.run_dir}")
    files = [trained.folder.config, trained.folder.path / "report.json", *([exported] if exported else [])]
    finish(trained.loggers, *files)
