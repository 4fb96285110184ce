# Sourced by submit.sh and status.sh, behind settings.sh: an experiment as a graph of stages, and what there is of it.

# visit_stages VISIT CONFIG [overrides]: for each stage, behind those that it needs, calls
#   VISIT STAGE SCRIPTS MADE_FROM AFTER TASKS ARGUMENTS…
# SCRIPTS, one after the other, with ARGUMENTS make all TASKS of the stage, which are lines of STATE, WHERE and the task's
# own override (none where there is one task), with tabs between. STATE is `complete` or says how far it is.
# MADE_FROM: tasks, as STAGE/OVERRIDE, without which these can't be made, or are to be made anew. AFTER: others to wait for.
visit_stages() {
  local visit=$1 experiment=(--config "${@:2}") made ranges named experts row task statistics
  made=$(ask pretrain.py --path pretrained_here)
  if [ "$(ask pretrain.py --path pretrained)" = "$made" ]; then
    $visit pretrain pretrain.py "" "" "$(single "$made")" "${experiment[@]}"
  fi

  # what is trained from the pretrained network: the ranges' experts, and others that the table has a row of
  ranges=$(planned finetune.py finetune.range=null | awk '{ print $0 "\tfinetune.range=" NR - 1 }')
  experts=$(awk -F '\t' '{ print "train/" $3 }' <<<"$ranges")
  named=
  for row in $ROWS; do
    case $row in
      pretrained | ensemble | merged | distilled) ;;
      *) named+=$'\n'$(planned finetune.py "finetune.range=$row")$'\t'finetune.range=$row ;;
    esac
  done
  $visit cache scripts/cache.py pretrain/ "" "$(cached "$ranges$named")" "${experiment[@]}"
  if [ -z "$REFERENCE" ]; then
    statistics=("${experiment[@]}" "evaluate.samples=[]")
  else
    statistics=(--config "$REFERENCE" "evaluate.samples=[]")
  fi
  made=$(python evaluate.py --path reference "${statistics[@]}")
  $visit statistics evaluate.py "" cache/ "$(single "$made")" "${statistics[@]}"
  $visit train finetune.py pretrain/ cache/ "$ranges$named" "${experiment[@]}"

  # the merged network, and the one that is distilled into it
  made=$(ask merge.py --path merged)
  if [ -z "$(ask merge.py --path searched)" ]; then
    $visit merge merge.py "$experts" "" "$(single "$made")" "${experiment[@]}"
  else
    $visit merge "search.py merge.py" "$experts" statistics/ "$(single "$made")" "${experiment[@]}"
  fi
  case " $ROWS " in
    *" distilled "*)
      task=finetune.range=distilled
      made=$(planned finetune.py $task)
      $visit distill finetune.py merge/ "" "$made"$'\t'$task "${experiment[@]}" ;;
  esac

  # images of each row, and what they are worth
  made=
  for row in $ROWS; do
    sample_row "$row"
  done
  local scored
  scored=$(single "$(ask evaluate.py --path results)" "$(ask report.py --path report)")
  $visit evaluate "evaluate.py merge.py report.py" "$made" statistics/ "$scored" "${experiment[@]}"
}

# sample_row ROW: visits the images of a model
sample_row() {
  local row=$1 from tasks options=("sample.model=$1")
  case $row in
    pretrained) from=pretrain/ ;;
    ensemble) from=$experts ;;
    merged) from=merge/ ;;
    distilled) from=distill/finetune.range=distilled ;;
    *) from=train/finetune.range=$row ;;
  esac
  tasks=$(planned sample_ddp.py "${options[@]}" "sample.blocks=$BLOCKS")
  if [ "$BLOCKS" != 1 ]; then
    options+=("sample.blocks=$BLOCKS")
    tasks=$(awk '{ print $0 "\tsample.block=" NR - 1 }' <<<"$tasks")
  fi
  $visit "sample-$row" sample_ddp.py "$from" "" "$tasks" "${experiment[@]}" "${options[@]}"
  made+=" $(awk -F '\t' -v stage="sample-$row" '{ print stage "/" $3 }' <<<"$tasks")"
}

# ask SCRIPT ARGUMENTS…: about the experiment
ask() {
  python "$@" "${experiment[@]}"
}

# planned SCRIPT OVERRIDE…: of each thing that a script would make: how far it is, and where
planned() {
  local script=$1
  shift
  python "$script" --dry-run "${experiment[@]}" "$@" >"$plan" || return
  sed -n -E 's/^[^ ].* -> (.*): (complete|[0-9]+ steps|[0-9]+ of [0-9]+ images)$/\2\t\1/p' "$plan"
}

# single PATH…: the one task of a stage that makes these
single() {
  local path state=complete
  for path; do
    [ -e "$path" ] || state=missing
  done
  printf '%s\t%s\n' $state "$path"
}

# cached TRAININGS: the task of the cache, which a run has found complete before it makes a folder of its own
cached() {
  local where state=missing
  while IFS=$'\t' read -r _ where _; do
    [ ! -f "${where%/unet}/config.yaml" ] || state=complete
  done <<<"$1"
  printf '%s\t%s\n' $state "$(ask finetune.py --path latent_cache)"
}

plan=$(mktemp)
trap 'rm -f "$plan"' EXIT
