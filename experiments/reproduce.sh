#!/usr/bin/env bash
# From ImageNet's archives to the numbers of the paper's tables: tokenizer, then B, L, XL and XXL. docs/reproduce.md
#
#   experiments/reproduce.sh --plan       what would be done, what it takes, every command; runs nothing
#   experiments/reproduce.sh              does it; a step whose result is there is skipped, a stopped one goes on
#   experiments/reproduce.sh --rehearse   the same commands at tiny size, on a CPU, in runs/rehearsal
#   --ablations                           with any of these: also the order of tokens, beta and K
#
# DOWNLOADS (downloads): where ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz and ADM's
# VIRTUAL_imagenet256_labeled.npz lie. MACHINE (experiments/trainer/8gpu.yaml): a layer of experiments/trainer, for
# training. DEVICES (8): GPUs that make tokens. DAR (dar): the command. PYTHON (python): of a rehearsal, which runs all
# commands in one process, since most of their time would be its start.
set -euo pipefail

mode=run rehearse=false ablations=false
for word in "$@"; do
    case $word in
        --plan) mode=plan ;;
        --rehearse) rehearse=true ;;
        --ablations) ablations=true ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
        *) echo "reproduce.sh: $word is no option: need --plan, --rehearse or --ablations" >&2; exit 2 ;;
    esac
done

read -ra program <<< "${DAR:-dar}"
dar() { "${program[@]}" "$@"; }
downloads=$(realpath -m -- "${DOWNLOADS:-downloads}")
machine=${MACHINE:-experiments/trainer/8gpu.yaml} devices=${DEVICES:-8}
reference=$downloads/VIRTUAL_imagenet256_labeled.npz
inputs=("$downloads"/ILSVRC2012_{img_train.tar,img_val.tar,devkit_t12.tar.gz} "$reference")

if $rehearse; then
    mkdir -p runs/rehearsal
    cd runs/rehearsal  # experiments/ and data/fruit64 are found from any folder
    downloads=downloads devices=1
    tokenizer="--config experiments/rehearsal/tokenizer.yaml"
    codebook="$tokenizer --model.init_args.config.codebook_size 32"
    ar="--config experiments/rehearsal/ar.yaml"
    measure="--reference data/imagenet/val --features color_edges --num_samples 8 --batch_size 8"
    rebuild="--features color_edges --batch_size 8"
else
    tokenizer="--config $machine" codebook="--config $machine" ar="--config $machine"
    measure="--reference $(printf %q "$reference") --full" rebuild=""
fi
from=$(printf %q "$downloads")

one_process='
import shlex, sys
from dar_lightning.cli import main

answers = open(3, "w", buffering=1)
for line in sys.stdin:
    try:
        status = main(shlex.split(line)) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    print(status, file=answers)
'

# Name; the file that says that it is done; GB of disk; hours of one H100; GB of its memory. All three are estimates,
# which docs/reproduce.md explains. The commands follow, one a line.
steps() {
    step shards data/imagenet/val/index.json 158 0 0 << END
dar shard --input $from/ILSVRC2012_img_train.tar --output data/imagenet/train
dar shard --input $from/ILSVRC2012_img_val.tar --output data/imagenet/val
END
    step tokenizer runs/tokenizer/v1/exported/config.json 7 264 40 << END
dar fit --config experiments/tokenizer/v1.yaml $tokenizer
dar export --ckpt runs/tokenizer/v1/checkpoints/last.ckpt --output runs/tokenizer/v1/exported
END
    step table_solvers runs/tables/solvers/table.md 49 10 10 << END
dar table --config experiments/evaluate/solvers.yaml --pipeline runs/tokenizer/v1/exported --reference data/imagenet/val \
$rebuild --output runs/tables/solvers
END
    step codebook4096 runs/tokenizer/codebook4096/exported/config.json 7 64 40 << END
dar fit --config experiments/tokenizer/v1.yaml --config experiments/tokenizer/codebook4096.yaml $codebook
dar export --ckpt runs/tokenizer/codebook4096/checkpoints/last.ckpt --output runs/tokenizer/codebook4096/exported
END
    step table_codebook runs/tables/codebook/table.md 20 4 10 << END
dar table --config experiments/evaluate/codebook.yaml --pipeline runs/tokenizer/v1/exported \
--reference data/imagenet/val $rebuild --output runs/tables/codebook
END
    step tokens data/imagenet_codes/val/index.json 7 9 5 << END
dar extract --tokenizer runs/tokenizer/v1/exported --shards data/imagenet/train --output data/imagenet_codes/train \
--devices $devices
dar extract --tokenizer runs/tokenizer/v1/exported --shards data/imagenet/val --output data/imagenet_codes/val \
--crops center
END
    model B 4 48 14
    table guidance_B B 20 4
    model L 8 144 35
    table guidance_L L 39 8
    table partial_tokens L 39 5
    model XL 17 304 41
    table guidance_XL XL 29 7
    model XXL 29 560 46
    table guidance_XXL XXL 10 3
    if $ablations; then
        for name in order:640:35 beta:21:37 groups:60:37; do
            IFS=: read -r sweep hours memory <<< "$name"
            step "sweep_$sweep" "runs/sweeps/$sweep/report/table.md" 40 "$hours" "$memory" << END
dar sweep experiments/sweeps/$sweep.yaml $($rehearse && echo --dry_run)
END
        done
    fi
}

model() {  # size, GB of disk, hours, GB of memory
    step "model_$1" "runs/pipeline_$1/config.json" "$2" "$3" "$4" << END
dar fit --config experiments/ar/$1.yaml $ar
dar export --ckpt runs/ar/$1/checkpoints/last.ckpt --tokenizer runs/tokenizer/v1/exported --shards data/imagenet/val \
--output runs/pipeline_$1
END
}

table() {  # file in experiments/evaluate, size, GB of disk, hours
    step "table_$1" "runs/tables/$1/table.md" "$3" "$4" 20 << END
dar table --config experiments/evaluate/$1.yaml --pipeline runs/pipeline_$2 $measure --output runs/tables/$1
END
}

disk=0 hours=0
list() {  # a row of the plan, and the commands if these alone were asked for
    local state=to\ do
    if [[ -e $2 ]]; then state=done; else disk=$((disk + $3)) hours=$((hours + $4)); fi
    printf '%-22s %-6s %6s %6s %6s\n' "$1" "$state" "$3" "$4" "$5"
    if [[ $mode == plan ]]; then sed 's/^/    /'; fi
}

perform() {
    local line
    if [[ -e $2 ]]; then echo "$1: done already: $2"; return; fi
    while IFS= read -r line <&3; do
        echo; echo "$1: \$ $line"
        eval "$line" < /dev/null || { echo "reproduce.sh: $1 stopped with status $?; the same command goes on" >&2; exit 1; }
    done 3<&0
}

step() { list "$@"; }
printf '%-22s %-6s %6s %6s %6s\n' step "" "GB" "GPU h" "GPU GB"
steps
echo "To do: $disk GB of disk ($(df -Ph . | awk 'NR == 2 {print $4}') are free here), $hours hours of one H100; all estimates."
if $rehearse; then echo "A rehearsal: the figures are the real run's; this takes minutes, megabytes and no GPU."; fi
if [[ $mode == plan ]]; then exit; fi

if $rehearse && [[ -z ${DAR:-} ]]; then
    coproc one { "${PYTHON:-python}" -c "$one_process" 3>&1 1>&2; }
    dar() {
        local status
        echo "${*@Q}" >&"${one[1]}"
        read -r status <&"${one[0]}" || status=1  # it has died
        return "$status"
    }
fi
if $rehearse; then
    "${PYTHON:-python}" - << 'END'  # ImageNet's three archives, of 24 and 12 fruit photos
import io, tarfile
from pathlib import Path
from dar_lightning.files import find_shipped

def pack(path, contents, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))

classes = ["n00000001", "n00000002", "n00000003"]
folder = Path("downloads")
folder.mkdir(exist_ok=True)
with tarfile.open(Path(find_shipped("data/fruit64/train")) / "000000.tar") as tar:
    members = [member for member in tar if member.name.endswith(".jpg")][:36]
    photos = [tar.extractfile(member).read() for member in members]
for i, name in enumerate(classes):
    pack(folder / f"{name}.tar", {f"{name}_{j}.JPEG": photo for j, photo in enumerate(photos[8 * i : 8 * i + 8])})
pack(folder / "ILSVRC2012_img_train.tar", {f"{name}.tar": (folder / f"{name}.tar").read_bytes() for name in classes})
val = {f"ILSVRC2012_val_{j + 1:08d}.JPEG": photo for j, photo in enumerate(photos[24:])}
pack(folder / "ILSVRC2012_img_val.tar", val)
truth = "".join(f"{classes[j % 3]}\n" for j in range(12)).encode()
pack(folder / "ILSVRC2012_devkit_t12.tar.gz", {"data/ILSVRC2012_validation_ground_truth.txt": truth}, "w:gz")
END
else
    for file in "${inputs[@]}"; do
        [[ -e $file ]] || { echo "reproduce.sh: $file is missing: need it in DOWNLOADS (docs/reproduce.md)" >&2; exit 2; }
    done
fi

step() { perform "$@"; }
steps
echo; echo "Done. The tables, the paper's numbers beside ours: $PWD/runs/tables/*/table.md"
