"""The paper's baselines as pure functions, one file each; `recipes` trains them, and
`artifacts.baseline` stores those that PEFT has no format for."""
