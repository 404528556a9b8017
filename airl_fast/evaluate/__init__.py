"""What a trained reward and its policies are worth. From the bottom up:

- measures on plain arrays: passk, rerank, subsets, localise, correlate, correctness;
- a reward that reads traces: judge, scoring, trace_parts, choose, locate, naming, describe, leakage;
- what a run ends with: policies, reward, record, final, summary, plots, watch;
- a command each: command (`eval`), rerank_command with reranking, score_command with line_writer, localise_command with
  located and located_view, transfer with sources and transfer_view, compare with compare_rows;
- tables and files: tables, outputs.
"""
