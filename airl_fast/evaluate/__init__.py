"""What a trained reward and its policies are worth.

- what a run ends with: policies, reward, record, final, summary, plots, watch;
- a command each: command (`eval`), rerank_command with reranking and correctness, transfer with sources and
  transfer_view, compare with compare_rows;
- tables and files: tables, outputs.
"""
