"""The embedded node editor: serves comfyui-frontend-package and runs graphs, for one person.

  server.py      the web server: `python3 run.py`
  guard.py       whom it refuses, and what a page may do
  sockets.py     the editors' WebSockets: messages, previews, the Console
  storage.py     its routes that read and write files: pictures, uploads, saved workflows, settings
  jobs.py        the queue, its worker thread, and the history
  validation.py  a prompt checked before anything runs
  execution.py   a prompt run: order, cache, progress, interruption
  context.py     what a node may ask of the host while it runs
  registry.py    the node classes, and how the editor is told of them
  stock.py       LoadImage, SaveImage, PreviewImage
  files.py       folders, contained paths, atomic writes
  workflow.py    workflow files in, prompts out; graph.py reads the editor's format
  render.py      `python3 run.py render`; arguments.py is what its options share with the server's

Everything beyond one person on one machine (other packs, list inputs, lazy nodes) is ComfyUI's.
"""
