"""WanLite's engine: students, their files, compression and distillation. It knows no ComfyUI."""
