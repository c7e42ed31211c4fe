"""MMLU: questions, prompts, scores, statistics. Agrees with lm-evaluation-harness 0.4.13 question by question."""
