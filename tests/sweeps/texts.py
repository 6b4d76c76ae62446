"""Specs of sweeps and of their base, as text."""

BASE = """\
kind: train
name: base
task: task.py:Task
task_args: {hidden: 128}
data: {train: data/train, eval: data/test, global_batch: 64, slots: 2}
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 0.01}
schedule: {name: cosine, warmup_steps: 20}
budget: {epochs: 30}
workers: {min: 1, max: 2}
checkpoint: {every_steps: 100}
"""
SEARCH = """\
kind: sweep
name: search
base: train.yaml
set: {workers: {min: 2, max: 2}}
mode: search
objective: {metric: val_loss, goal: min, every: 20, max_steps: 200, target: 0.12}
space:
  optimizer.lr: {log: [1.0e-4, 1.0e-1]}
  data.global_batch: {choice: [64, 256]}
  optimizer.name: {choice: [adamw, momentum, sgd]}
  optimizer.momentum: {one_minus_log: [5.0e-3, 0.3], when: {optimizer.name: momentum}}
  optimizer.betas.0: {uniform: [0.5, 0.95], when: {optimizer.name: [adamw]}}
  task_args.hidden: {int_log: [16, 512]}
search: {method: quasirandom, seed: 0}
budget: {unit: trials, per_arm: 16}
early_stop: {method: asha, grace: 20, factor: 3}
confirm: {seeds: 5, top_k: 1}
"""
FAIR = """\
kind: sweep
name: fair
base: train.yaml
mode: fair
objective: {every: 20, max_steps: 200, target: 0.3}
space:
  clip_norm: {choice: [null, 1.0]}
arms:
  - {name: sgd, optimizer: {name: sgd}}
  - name: nesterov
    optimizer: {name: nesterov, lr: {log: [0.02, 5.0]}, momentum: {one_minus_log: [5.0e-3, 0.3]}}
  - {name: adamw, baseline: true, optimizer: {name: adamw, weight_decay: 0.1}, space: default}
budget: {unit: trials, per_arm: 6}
"""
