"""BA-LoRA: a principal-singular adapter (PiSSA) with three penalties against what the pretraining data got wrong.

python examples/finetune_ba_lora.py
python examples/finetune_ba_lora.py --model NAME --data my.jsonl --learning-rate 2e-5 --rank 128
"""

import peft
from small_texts import arguments, load, parser

from wellposed.integrations.transformers_trainer import RegularizedTrainer
from wellposed.losses.adapter_teacher import InitialAdapterTeacher
from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA

options = parser(__doc__)
options.add_argument("--rank", type=int, default=4)
options.add_argument("--variant", default="v6", choices=["v6", "v5"], help="which version of the paper")
options = options.parse_args()

model, rows, collate = load(options)
config = peft.LoraConfig(
    r=options.rank,
    lora_alpha=options.rank,
    init_lora_weights="pissa",
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
model = peft.get_peft_model(model, config)

# The base weights are no longer the pretrained ones: the teacher is the model at the adapter's first factors.
method = BiasAlleviatingLoRA("generation", options.variant, teacher=InitialAdapterTeacher())
trainer = RegularizedTrainer(model, arguments(options), train_dataset=rows, data_collator=collate, regularizer=method)
trainer.train()

merged = trainer.model.merge_and_unload()
merged.save_pretrained(options.output)
print(f"merged and saved in {options.output}")
