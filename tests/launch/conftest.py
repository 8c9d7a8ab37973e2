"""The launch scripts, run dry."""

import subprocess

import pytest

from tests.launch.scripts import LAUNCH, PASTE

# In a dry run no real command may be found.
FORBIDDEN = ('gcloud', 'kubectl', 'docker', 'sbatch', 'python3')


@pytest.fixture
def dry_run(tmp_path):
  """(script, *arguments, **variables) -> (lines of stdout, stderr)."""
  for name in FORBIDDEN:
    path = tmp_path / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\necho "not dry: $0" >&2; exit 1\n')
    path.chmod(0o755)
  (tmp_path / 'bin' / 'paste').write_text(PASTE)
  (tmp_path / 'bin' / 'paste').chmod(0o755)

  def dry_run(script, *arguments, **variables):
    done = subprocess.run(
      [LAUNCH / script, *arguments],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      timeout=600,
      env={
        'PATH': f'{tmp_path}/bin:/usr/bin:/bin',
        'DRY_RUN': '1',
        'VENV': f'{tmp_path}/venv',
        'TMPDIR': '/tmp',
        # Else uncommitted changes of this checkout would be warned of.
        'COMMIT': 'HEAD',
      }
      | variables,
    )
    assert done.returncode == (1 if done.stderr else 0)
    return done.stdout.splitlines(), done.stderr

  return dry_run
