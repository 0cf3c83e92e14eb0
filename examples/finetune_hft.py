"""Half fine-tuning (HFT) of a language model: a random half of every layer's matrices stays as it is.

python examples/finetune_hft.py
python examples/finetune_hft.py --model NAME --data my.jsonl --learning-rate 2e-5 --resample epoch
"""

from small_texts import arguments, load, parser

from wellposed.integrations.transformers_trainer import RegularizedTrainer
from wellposed.weights.half_fine_tuning import HalfFineTuning

options = parser(__doc__)
options.add_argument("--ratio", type=float, default=0.5, help="share of the matrices that is frozen")
options.add_argument("--strategy", default="category", choices=["category", "layer", "model", "element"])
options.add_argument("--resample", default="stage", choices=["stage", "epoch"])
options = options.parse_args()

model, rows, collate = load(options)
before = {name: p.detach().clone() for name, p in model.named_parameters()}
trainer = RegularizedTrainer(
    model,
    arguments(options),
    train_dataset=rows,
    data_collator=collate,
    regularizer=HalfFineTuning(ratio=options.ratio, strategy=options.strategy, resample=options.resample),
)
trainer.train()
trainer.save_model()

# `model` is trained and plain: every parameter is free again.
moved = [name for name, p in trainer.model.named_parameters() if not p.equal(before[name])]
print(f"{len(moved)} of {len(before)} tensors moved, saved in {options.output}")
