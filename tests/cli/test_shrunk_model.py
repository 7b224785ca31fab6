"""A folder of `save_model` as the `model:` of a recipe: checked, tuned, scored and asked like any other."""
import json

import slimtune as st
from slimtune.io.models import load_tokenizer
from slimtune.recipe import predict_run


def test_a_shrunk_model_is_tuned_and_predicts(cli, recipe, shelf, tmp_path):
    model = st.load_model(shelf / "bert", "classification", num_labels=2)
    st.shrink(model, keep={"encoder.0.attn.heads": [1, 3], "encoder.0.mlp.act": range(20), "encoder.1.attn.heads": []})
    st.save_model(model, tmp_path / "small", load_tokenizer(shelf / "bert"))
    file = recipe(model=str(tmp_path / "small"), train={"steps": 60, "batch_size": 8, "learning_rate": 1e-2,
                                                        "threads": 1, "log_every": 20})
    checked = cli("check", file)
    assert checked.exit_code == 0, checked.output
    tuned = cli("tune", file)
    assert tuned.exit_code == 0, tuned.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["test"]["macro_f1"] > 0.9  # guessing gives 0.5
    assert result["counts"]["adapter"] == 2 * 4 * (32 + 16)  # q and v of two heads of the first block; no other has any
    scored = cli("eval", tmp_path / "run")
    assert f"macro_f1  {result['metrics']['test']['macro_f1']:.4f}" in scored.output
    assert len(list(predict_run(tmp_path / "run", shelf / "test.csv"))) == 24
