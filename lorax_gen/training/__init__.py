"""Training, the same for every recipe.

experiment   what a recipe passes to the loop
run          RunConfig: steps, intervals, checkpoints
loop         the training loop and its run directory
run_dir      whose a run directory is, and what a release may tell of it
signals      SIGINT and SIGTERM during a run
step         losses and the train step
state        the training state: step, key, trainables, statistics, optimizer
optimizer    AdamW, its schedule and clipping
checkpoint   checkpoints with orbax
checksums    a checksum of each leaf of a state
archive      checkpoints in object stores that orbax cannot write to
loggers      TensorBoard, Weights & Biases, and the protocol of others
console      what a run says on stderr
metrics      rows of metrics, speed, memory, router health, profiles
"""
