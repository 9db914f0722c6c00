"""README.md, followed by the letter: every command of its code blocks is run, in order, in one shell for each section, on a
small corpus in a copy of the repository; as root and as a user without rights. COMMANDS says how each is run, or why not:
a command that it does not know fails the test, as does a row that no command needs.

So do the commands with which scripts/quickstart.sh closes, and files that README names must be there.
"""
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import unittest

import lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ["comm", "configs", "include", "kernels", "scripts", "tests", "train"]  # of a clean clone
NOBODY = 65534
STEPS = 12  # of the run that the others go on from
CHECKPOINT = f"step-{STEPS:08}"
# Steps are cut by words; a whole run of what `tatara init` writes is in test_init.
SHORT = f" run.stop_at={STEPS} checkpoint.every=4"


def as_written(command):
    return command


def adding(words):
    return lambda command: command + words


def replacing(*pairs):
    def change(command):
        for old, new in pairs:
            assert old in command, (old, command)
            command = command.replace(old, new)
        return command
    return change


def not_run(reason):
    """The command is only parsed by the shell."""
    assert reason
    return None


def branching(last):
    return lambda command: replacing(("RUN/step-00001000", f"runs/mine/{CHECKPOINT}"))(command) + f" run.stop_at={last}"


# By the section's beginning and the command's: how it is run.
COMMANDS = [
    ("Tatara", r"\./scripts/quickstart\.sh", adding(" --help")),  # takes minutes, and texts from the network
    ("Tatara", r"\./scripts/test\.sh", adding(" --help")),  # runs this test
    ("A first run", r"\./scripts/install\.sh", replacing((".sh ", ".sh --list "))),  # installs with root's rights
    ("A first run", r"cmake -S", as_written),
    ("A first run", r"cmake --build build", adding(" --target help")),  # scripts/test.sh has built it
    ("A first run", r"export OMPI_ALLOW", as_written),
    ("A first run", r"cat corpus/\*\.jsonl \| jq", as_written),
    ("A first run", r"spm_train ", as_written),
    ("A first run", r"mpirun .* prepare ", as_written),
    ("A first run", r"build/tatara init ", as_written),
    ("A first run", r"mpirun .* train mine\.yaml", adding(SHORT)),
    ("A first run", r"build/tatara sample --ckpt ", adding(" --tokens 8")),
    ("A first run", r"build/tatara data show ", as_written),
    ("A first run", r"build/tatara plan ", as_written),
    ("A first run", r"build/tatara ckpt ls ", as_written),
    ("A first run", r"build/tatara sample --help", as_written),
    ("Configuration", r"build/tatara train configs/quickstart\.yaml", adding(" run.stop_at=1 model.layers=1 batch.micro=1")),
    ("Several ranks", r"mpirun -n 2 ", adding(f" run.stop_at={STEPS + 1}")),
    ("Several ranks", r"mpirun -n 16 --hostfile", not_run("there are no other hosts")),
    ("Several ranks", r"srun ", not_run("Slurm is started in test_slurm alone")),
    ("Slurm", r"scripts/submit\.sh ", replacing((".sh ", ".sh --dry-run --scheduler slurm "))),
    ("Checkpoints", r"build/tatara ckpt show ", replacing(("RUN/step-00001000", f"runs/mine/{CHECKPOINT}"))),
    ("Checkpoints", r"build/tatara ckpt diff ", replacing(("RUN/step-00001000", f"runs/mine/{CHECKPOINT}"),
                                                          ("OTHER/step-00001000", f"runs/mine/{CHECKPOINT}"))),
    ("Checkpoints", r"build/tatara train mine\.yaml run\.dir=(decay|new) ", branching(2)),
    ("Checkpoints", r"build/tatara train mine\.yaml run\.dir=branch ", branching(STEPS + 2)),
    ("GPUs", r"cmake -S .* -DTATARA_CUDA=ON", not_run("there is no nvcc; test nvcc_build compiles what it would")),
    ("GPUs", r"cmake --build", not_run("the same")),
    ("GPUs", r"scripts/smoke\.sh", not_run("there is no GPU; test smoke_emulated runs it")),
    ("GPUs", r"mpirun .* device=cuda", not_run("the same; test_cuda trains on the emulated one")),
]
OTHER_BLOCKS = {"How the house": "the folders, not commands"}
# What the text itself tells people to type, beside the blocks: covered there or in tests of their own.
IN_TEXT = [r"build/tatara( \w+)? --help", r"build/tatara train --help-config", r"tatara (init|plan|train|ckpt|sample|prepare)( .*)?",
           r"touch RUN/(STOP|SAVE)", r"sbatch --nodes=8 .*", r"scripts/test\.sh (-L unit|--all)", r"cat corpus/\*\.txt",
           r"mpirun --quiet", r"scripts/install\.sh arm debian", r"scripts/debian\.sh trixie"]


def sections(text):
    """(heading, text) of each part of README."""
    parts = re.split(r"^#{1,2} (.*)$", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


def block_commands(block):
    """The commands of a block, continued lines joined, comments and empty lines left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*$", "", line).strip())]


def change_for(section, command, used):
    rows = [row for row in COMMANDS if section.startswith(row[0]) and re.match(row[1], command)]
    assert len(rows) == 1, f"README, {section}: {len(rows)} rows of COMMANDS for: {command}"
    used.add(COMMANDS.index(rows[0]))
    return rows[0][2]


def shell_script(text):
    """All commands of README, as one script for each section that has some."""
    scripts, used = [], set()
    for section, body in sections(text):
        lines = []
        if any(section.startswith(other) for other in OTHER_BLOCKS):
            continue
        for block in re.findall(r"^```\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL):
            for command in block_commands(block):
                change = change_for(section, command, used)
                lines += [f"echo + {shlex.quote(command)}", change(command) if change else f": not run: {shlex.quote(command)}"]
        if lines:
            scripts.append((section, lines))
    unused = [row[:2] for i, row in enumerate(COMMANDS) if i not in used]
    assert not unused, f"README has no command for these rows of COMMANDS: {unused}"
    return scripts


class Readme(lib.Case):
    def setUp(self):
        super().setUp()
        version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
        if "Open MPI" not in version:
            self.skipTest("README's mpirun is Open MPI's")
        self.dir.chmod(0o755)
        self.clone = self.dir / "tatara"
        (self.clone / "build").mkdir(parents=True)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, self.clone / name)
        shutil.copy(ROOT / "CMakeLists.txt", self.clone)
        shutil.copy(lib.options.tatara, self.clone / "build/tatara")
        (self.clone / "corpus").mkdir()
        shutil.copy(lib.options.data / "corpus.jsonl", self.clone / "corpus")
        data = self.clone / "quickstart"  # what configs/quickstart.yaml names
        (data / "shards").mkdir(parents=True)
        shutil.copy(lib.tokenizer(), data)
        shutil.copytree(lib.train_shards(), data / "shards/ja")
        shutil.copytree(lib.valid_shards(), data / "shards/ja-valid")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("OMPI_ALLOW")}
        self.environment.update(OMP_WAIT_POLICY="passive", HOME=str(self.clone), OMPI_MCA_oob_tcp_if_include="lo",
                                OMPI_MCA_btl="self,vader", OMPI_MCA_mpi_yield_when_idle="1")
        if os.cpu_count() < 4:  # cores with two threads each are one slot each
            self.environment["OMPI_MCA_rmaps_base_oversubscribe"] = "1"

    def shell(self, lines, user):
        """Runs the lines in one shell, each of which must succeed; returns what they print."""
        prefix = []
        if user == "nobody":
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", self.dir], check=True)
            prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        result = subprocess.run([*prefix, "bash", "-e", "-c", "\n".join(lines)], cwd=self.clone, env=self.environment,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                timeout=300, check=False)
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def follow(self, user):
        for section, lines in shell_script((ROOT / "README.md").read_text()):
            printed = self.shell(["export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"] * (
                section != "A first run of your own" and user == "root") + lines, user)
            # configs/quickstart.yaml, with words that README shows, may leave what is known; a first run must not.
            if section.startswith(("A first run", "Checkpoints")):
                self.assertNotIn("warning:", printed)
        self.assertTrue((self.clone / "mine.yaml").exists())
        self.assertTrue((self.clone / "branch" / f"step-{STEPS + 2:08}").exists())

    @unittest.skipUnless(os.geteuid() == 0, "only root can run it as root")
    def test_as_root(self):
        self.follow("root")

    def test_as_user(self):
        self.follow("nobody" if os.geteuid() == 0 else "user")

    def closing_hint(self, user):
        """Lets quickstart.sh pass by all that it makes, which is there, and does what it says at its end."""
        bin_dir = self.clone / "bin"
        bin_dir.mkdir()
        for name in ("cmake", "gnuplot"):
            (bin_dir / name).write_text("#!/bin/sh\n")
            (bin_dir / name).chmod(0o755)
        (self.clone / "scripts/install.sh").write_text("#!/bin/sh\n")
        self.environment["PATH"] = f"{bin_dir}:{self.environment['PATH']}"
        made, run = self.clone / "quickstart", self.clone / "runs/quickstart"
        for package in ("manpages-ja", "manpages-ja-dev", "debian-reference-ja", "libreoffice-help-ja"):
            (made / "packages" / package).mkdir(parents=True)
        (self.clone / "build/build.ninja").touch()
        config, _ = self.config("model")
        result = lib.tatara(["train", config, f"data.valid=[{{path: {lib.valid_shards()}}}]"])
        self.assertEqual(result.status, 0, result)
        run.mkdir(parents=True)
        shutil.copy(self.dir / "model/metrics.jsonl", run)
        shutil.copytree(lib.checkpoints(self.dir / "model")[-1], run / "step-00000140")
        for name in ("corpus.jsonl", "tok.model", "loss.png", "sample.txt"):  # each newer than what it is made from
            (made / name).touch()
        (made / "shards/ja").touch()
        environment = dict(self.environment)
        printed = self.shell(["export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "scripts/quickstart.sh"],
                             user)
        self.environment = environment
        hints = [line.strip() for line in printed.split("To try next:")[1].splitlines() if line.startswith("  ")]
        commands = [re.sub(r"   +.*$", "", hint) for hint in hints if not hint.startswith("README.md")]
        self.assertEqual(len(commands), 3, printed)
        shorter = [command + (" --tokens 4" if " sample " in command else " run.stop_at=1 batch.global=2 batch.micro=1 "
                              "model.layers=1" if command.startswith("mpirun") else "") for command in commands]
        self.shell(shorter, user)

    @unittest.skipUnless(os.geteuid() == 0, "only root can run it as root")
    def test_quickstart_as_root(self):
        self.closing_hint("root")

    def test_quickstart_as_user(self):
        self.closing_hint("nobody" if os.geteuid() == 0 else "user")

    def test_text(self):
        """Files that README names are there; commands in its text are among those that are known."""
        text = re.sub(r"^```\n.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in set(re.findall(r"`([^`\n]+)`", text.replace("\n", " "))):
            if re.match(r"(\./)?(scripts|configs|include|train|kernels|comm|tests)/\S*$", span):
                self.assertTrue((ROOT / span).exists(), f"README names {span}")
            elif re.match(r"(\./)?(build/tatara|tatara|scripts/\S+|sbatch|touch|mpirun|srun|cmake|spm_train|cat) ", span):
                self.assertTrue(any(re.fullmatch(known, span) for known in IN_TEXT), f"README has a command {span}")

    def test_skipped(self):
        """The summary of skipped tests with which scripts/test.sh ends."""
        results = self.dir / "results.xml"
        results.write_text("""<testsuite>
            <testcase name="a"><system-out>skipped: no a here\n</system-out><skipped message="SKIP_RETURN_CODE=77"/></testcase>
            <testcase name="b"><system-out>test_1 (__main__.B.test_1) ... ok
test_2 (__main__.B.test_2)
A description. ... skipped 'no b here'
test_3 (__main__.B.test_3) ... skipped 'no c'
test_4 (__main__.B.test_4) ... skipped 'no c'
</system-out></testcase>
            <testcase name="d"><skipped message=""/></testcase></testsuite>""")
        printed = subprocess.run(["/usr/bin/python3", ROOT / "tests/skipped.py", results, self.dir / "none.xml"],
                                 capture_output=True, text=True, check=True).stdout
        self.assertEqual(printed.split("\n")[1:-1], ["Skipped:", "  a: no a here", "  b, test_2: no b here",
                                                     "  b, 2 cases: no c", "  d: it does not say why"])

    def test_coverage_is_checked(self):
        """A block, a command or a row too many is noticed."""
        text = (ROOT / "README.md").read_text()
        for wrong in (text + "\n## New\n\n```\nbuild/tatara train new.yaml\n```\n",
                      text.replace("build/tatara plan mine.yaml ranks=8", "build/tatara plan mine.yaml\nls"),
                      text.replace("build/tatara plan mine.yaml ranks=8", "")):
            with self.assertRaises(AssertionError):
                shell_script(wrong)


if __name__ == "__main__":
    lib.main()
