"""How accurate a system is, and how much compute, memory and time it needs.

answerers       what is evaluated: a model, what it reads, and how it is specialised
benchmark       one answerer on one benchmark
agent           one answerer on GPT4Tools
agent_metrics   the five success rates of GPT4Tools
world           answerers on the embedded world, and a quiz for training runs
exact           questions with one correct answer
rows            one answerer on rows of own tasks, and what answers without a model reach
suite           several answerers on several benchmarks and files of rows
report          the report: answerers by tasks, and the cost of a question
tables          reports on the terminal
pictures        figures of reports and training runs; gate_pictures: of gates; style: what all share
page            reports as one HTML page; paper: the numbers of the paper that stand beside them
metrics         accuracies, standard errors, means
latency         seconds and bytes of one question at a time
progress        a bar for each part of an evaluation
item_log        results of single items in a file, for resuming
harness         lm-evaluation-harness on models of this package
harness_model   the model class that lm-evaluation-harness calls
"""
