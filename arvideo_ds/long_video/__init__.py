"""Long video: LVMAE and what it needs.

tokenizer.py      clips as codes; importance.py  scores and chooses tokens
training.py       its loss; quality.py  how good it is, in numbers and pictures
scorers.py        the ways to score tokens; scoring_pass.py  shards in, scores out
score_store.py    the scores on disk (data.scores); needs no torch
lvmae.py          the objective that predicts only the highest scored tokens

Rooms below use it only through tables of names (models/objective.py) and the protocol
`data.clips.ScoreReader`. Must not know DeepSpeed or the loop.
"""
