"""A saved reward that reads traces: `judge` scores them, `choose` makes a trace's score, `locate` and `naming` name a
step, `describe` writes a trace's rewards down, `leakage` refuses what the reward was trained on."""
