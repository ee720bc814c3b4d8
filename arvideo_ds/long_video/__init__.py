"""Long video: LVMAE and what it needs - a tokenizer, scores of all tokens, and their store.

tokenizer.py      clips as codes; importance.py  its network that scores tokens
training.py       its loss; quality.py and pictures.py  how good it is
scorers.py        the ways to score tokens; scoring_pass.py  shards in, scores out
score_store.py    the scores on disk (data.scores); needs no torch
lvmae.py          the objective that predicts the highest scored tokens alone

Rooms below reach it through tables of names only (models/objective.py) and the protocol
`data.clips.ScoreReader`. Must not know DeepSpeed or the loop.
"""
