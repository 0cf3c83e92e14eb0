"""CoLM: draw a large pool, keep its small sources and the medoids of the others, train on that half.

python examples/finetune_colm.py
python examples/finetune_colm.py --model NAME --data my.jsonl --learning-rate 2e-5 --pool 128 --batch-size 4
"""

from small_texts import arguments, load, parser

from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.integrations.transformers_trainer import RegularizedTrainer

options = parser(__doc__)
options.add_argument("--pool", type=int, default=8, help="examples from which each step chooses")
options.add_argument("--ratio", type=float, default=0.5, help="share of the pool that is trained on")
options.add_argument("--ranking", default="facility", choices=["facility", "random"], help="random is the control")
options = options.parse_args()

model, rows, collate = load(options)
coreset = MiniBatchCoreset(
    ratio=options.ratio,
    small_sources="below_mean",
    ranking=options.ranking,
    chunk_size=options.batch_size,
)
trainer = RegularizedTrainer(
    model,
    # The pool of one optimizer step is all of its micro-batches together.
    arguments(options, gradient_accumulation_steps=max(1, options.pool // options.batch_size)),
    train_dataset=rows,
    data_collator=collate,
    regularizer=coreset,
    extra_columns=["source"],
)
trainer.train()
trainer.save_model()
shares = [entry["coreset_small_share"] for entry in trainer.state.log_history if "coreset_small_share" in entry]
print(f"{coreset.updates} steps; share of small sources {sum(shares) / len(shares):.2f}; saved in {options.output}")
