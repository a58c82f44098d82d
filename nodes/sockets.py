"""The sockets that only WanLite has. What they carry is small and frozen: wires are cached, evicted and shared."""
from comfy_api.latest import io

Student = io.Custom("WANLITE_STUDENT")          # wanlite_model.compress.handle.StudentHandle: where its weights are, never the weights
Prompts = io.Custom("WANLITE_PROMPTS")          # wanlite_model.prompts.PromptBank
Recipe = io.Custom("WANLITE_RECIPE")            # {name: value} of wanlite_model.distill.job.Recipe that take the place of the preset's
