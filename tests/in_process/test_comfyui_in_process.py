"""The fixtures themselves: ComfyUI on the CPU in a folder of its own, and the pack beside it."""
from pathlib import Path


def test_nodes_is_comfyuis(comfyui, comfyui_folder):
    assert Path(comfyui.nodes.__file__).resolve() == comfyui_folder.resolve() / "nodes.py"


def test_comfyui_uses_the_cpu_and_only_its_own_folders(comfyui):
    import comfy.model_management
    assert comfy.model_management.get_torch_device().type == "cpu"
    folders = [folder for paths, _ in comfyui.folder_paths.folder_names_and_paths.values() for folder in paths]
    folders += [comfyui.folder_paths.get_output_directory(), comfyui.folder_paths.get_input_directory()]
    assert all(Path(folder).is_relative_to(comfyui.base) for folder in folders), folders


def test_every_node_of_the_pack_has_a_schema_comfyui_accepts(comfyui, pack):
    import asyncio
    extension = asyncio.run(pack("").comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert nodes
    for node in nodes:
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__
        assert schema.category.startswith("WanLite")
