{{/*
A workload with the sidecar in its pods. Arguments: the root, and the name of the template that renders the workload.

  {{- define "trader.workload" }}
  apiVersion: apps/v1
  kind: Deployment
  …
  {{- end }}
  {{- include "killswitch.guard" (list . "trader.workload") }}

Takes Deployments, StatefulSets and DaemonSets. Refuses what would not be guarded, or would not come back after a restart.
*/}}
{{- define "killswitch.guard" -}}
{{- $root := index . 0 -}}
{{- $text := include (index . 1) $root -}}
{{- include "killswitch.checkValues" $root -}}
{{- if not $root.Values.killswitch.enabled -}}
{{- $text -}}
{{- else if regexMatch "(?m)^---\\s*$" (regexReplaceAll "^\\s*---" $text "") -}}
{{- fail (printf "killswitch: template %q renders more than one document; guard one workload at a time" (index . 1)) -}}
{{- else if trim $text -}}
{{- $workload := fromYaml $text -}}
{{- if hasKey $workload "Error" -}}
{{- fail (printf "killswitch: template %q does not render YAML: %s" (index . 1) $workload.Error) -}}
{{- end -}}
{{- if not (has $workload.kind (list "Deployment" "StatefulSet" "DaemonSet")) -}}
{{- fail (printf "killswitch: template %q renders a %s; a Deployment, StatefulSet or DaemonSet can be guarded" (index . 1) ($workload.kind | default "document without a kind")) -}}
{{- end -}}
{{- $name := printf "%s %s" $workload.kind $workload.metadata.name -}}
{{- include "killswitch.refuse" (list $root $workload $name) -}}
{{- include "killswitch.patchWorkload" (list $root $workload) -}}
{{- include "killswitch.patchPod" (list $root $workload.spec.template) -}}
{{- toYaml $workload -}}
{{- end -}}
{{- end }}

{{/* "true" where every pod of a workload would have the same switch name. */}}
{{- define "killswitch.nameIsFixed" -}}
{{- $name := include "killswitch.switchName" . -}}
{{- if and (not .Values.killswitch.existingConfigMap) (not (regexMatch "\\$\\{POD_(NAME|UID|IP)[}:]" $name)) -}}true{{- end -}}
{{- end }}

{{/* Fails with the reason where a workload cannot be guarded as it is. Arguments: the root, the workload, what to call it. */}}
{{- define "killswitch.refuse" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $name := index . 2 -}}
{{- $v := $root.Values.killswitch -}}
{{- $pod := $workload.spec.template.spec -}}
{{- $fixed := include "killswitch.nameIsFixed" $root -}}
{{- $claimed := eq $v.state.volume "persistentVolumeClaim" -}}
{{- $alone := and (ne $workload.kind "DaemonSet") (eq (toString ($workload.spec.replicas | default 0)) "1") -}}
{{- $count := ternary "one on each node" (toString ($workload.spec.replicas | default "not written, so an autoscaler may choose them")) (eq $workload.kind "DaemonSet") -}}
{{- $zero := and (hasKey $workload.spec "replicas") (eq (toString $workload.spec.replicas) "0") -}}
{{- if and $fixed (not $alone) (not $zero) -}}
{{- fail (printf "killswitch: %s: killswitch.config.switch.name is %q for every pod, and replicas are %s: two switches would take each other for themselves. Write replicas: 1, or put ${POD_NAME} into the name" $name (include "killswitch.switchName" $root) $count) -}}
{{- end -}}
{{- if and $claimed (not $alone) (not $zero) -}}
{{- fail (printf "killswitch: %s: killswitch.state.volume is persistentVolumeClaim, and replicas are %s: only one sidecar may hold a state folder. Write replicas: 1, or use a StatefulSet with volumeClaimTemplate" $name $count) -}}
{{- end -}}
{{- if and $claimed (eq $workload.kind "Deployment") (not $fixed) (not $v.existingConfigMap) -}}
{{- fail (printf "killswitch: %s: its pods change their names, and the state on the volume belongs to one name: set killswitch.config.switch.name, for example ${POD_NAMESPACE}/%s" $name $workload.metadata.name) -}}
{{- end -}}
{{- if and (or $fixed $claimed) (not $zero) -}}
{{- /* All templates of a chart see the same values, so a second workload finds the first one's name there. */ -}}
{{- $first := get $v "guardedAlready" -}}
{{- if and $first (ne $first $name) -}}
{{- fail (printf "killswitch: %s: %s of this chart has the same %s already. Put ${POD_NAME} into killswitch.config.switch.name, and give each pod a volume of its own" $name $first (ternary "switch name" "claim" (eq $fixed "true"))) -}}
{{- end -}}
{{- $_ := set $v "guardedAlready" $name -}}
{{- end -}}
{{- if and (eq $v.state.volume "volumeClaimTemplate") (ne $workload.kind "StatefulSet") -}}
{{- fail (printf "killswitch: %s: killswitch.state.volume volumeClaimTemplate is for a StatefulSet; use emptyDir or persistentVolumeClaim" $name) -}}
{{- end -}}
{{- if and $pod.hostNetwork (not (has (dig "gate" "listen" "" $v.config | toString | lower) (list "off" "false" "no"))) -}}
{{- fail (printf "killswitch: %s: with hostNetwork the gate's port would be the node's: other pods would collide with it or ask this bot's gate. Set killswitch.config.gate.listen: off and let the bot ask /run/killswitch/gate.sock" $name) -}}
{{- end -}}
{{- if and (or $pod.shareProcessNamespace $pod.hostPID) (not $v.trading.allowSharedProcesses) -}}
{{- fail (printf "killswitch: %s: containers that share processes reach each other's files under /proc, and whoever reaches the control socket owns the switch. Give the sidecar a UID of its own (killswitch.runAsUser) and set killswitch.trading.allowSharedProcesses: true" $name) -}}
{{- end -}}
{{- $names := list -}}
{{- range concat ($pod.containers | default list) ($pod.initContainers | default list) -}}
{{- $names = append $names .name -}}
{{- range .volumeMounts -}}
{{- if hasPrefix "killswitch-" .name -}}
{{- fail (printf "killswitch: %s: a container mounts the volume %q; the sidecar's volumes are mounted by this chart alone" $name .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if has "killswitch" $names -}}
{{- fail (printf "killswitch: %s: it has a container named killswitch already" $name) -}}
{{- end -}}
{{- range $v.trading.containers -}}
{{- if not (has . $names) -}}
{{- fail (printf "killswitch: %s: killswitch.trading.containers names %q, and its containers are %s" $name . (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Changes the workload around its pods. Arguments: the root, the workload. */}}
{{- define "killswitch.patchWorkload" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $state := $root.Values.killswitch.state -}}
{{- $_ := set $workload.metadata "labels" (merge (include "killswitch.podLabels" $root | fromYaml) ($workload.metadata.labels | default dict)) -}}
{{- if and (eq $workload.kind "Deployment") (eq $state.volume "persistentVolumeClaim") -}}
{{- /* A new pod beside the old one would wait for its volume, or for the lock on it. */ -}}
{{- $_ := set $workload.spec "strategy" (dict "type" "Recreate") -}}
{{- end -}}
{{- if eq $state.volume "volumeClaimTemplate" -}}
{{- $own := include "killswitch.volumeClaimTemplate" $root | fromYamlArray -}}
{{- $_ := set $workload.spec "volumeClaimTemplates" (concat ($workload.spec.volumeClaimTemplates | default list) $own) -}}
{{- end -}}
{{- end }}

{{/* Changes the pod template. Arguments: the root, the template. */}}
{{- define "killswitch.patchPod" -}}
{{- $root := index . 0 -}}
{{- $template := index . 1 -}}
{{- $v := $root.Values.killswitch -}}
{{- $pod := $template.spec -}}
{{- if not $template.metadata -}}{{- $_ := set $template "metadata" dict -}}{{- end -}}
{{- $metadata := $template.metadata -}}
{{- $_ := set $metadata "labels" (merge (include "killswitch.podLabels" $root | fromYaml) ($metadata.labels | default dict)) -}}
{{- /* Without it kubectl's logs, exec and attach would choose by the order of containers. */ -}}
{{- $annotations := dict "kubectl.kubernetes.io/default-container" (index $pod.containers 0 "name") -}}
{{- $annotations = mergeOverwrite $annotations ($metadata.annotations | default dict) -}}
{{- range $key, $port := include "killswitch.podAnnotations" $root | fromYaml -}}
{{- /* A list of ports that the chart excludes itself is continued. */ -}}
{{- $_ := set $annotations $key (append (without (list (index $annotations $key)) nil "") $port | join ",") -}}
{{- end -}}
{{- $_ := set $metadata "annotations" $annotations -}}
{{- range $pod.containers -}}
{{- if or (not $v.trading.containers) (has .name $v.trading.containers) -}}
{{- $_ := set . "volumeMounts" (concat (.volumeMounts | default list) (include "killswitch.volumeMount" $root | fromYamlArray)) -}}
{{- end -}}
{{- end -}}
{{- $placement := include "killswitch.placement" $root -}}
{{- $sidecar := include "killswitch.sidecar" (list $root $placement) | fromYamlArray -}}
{{- if eq $placement "native" -}}
{{- /* First: its rules see their first readings while the chart's own init containers still work. */ -}}
{{- $_ := set $pod "initContainers" (concat $sidecar ($pod.initContainers | default list)) -}}
{{- else -}}
{{- $_ := set $pod "containers" (concat $sidecar $pod.containers) -}}
{{- $needed := add (int $v.lingerSeconds) 10 -}}
{{- $_ := set $pod "terminationGracePeriodSeconds" (max $needed (int ($pod.terminationGracePeriodSeconds | default 30))) -}}
{{- end -}}
{{- $_ := set $pod "volumes" (concat ($pod.volumes | default list) (include "killswitch.volumes" $root | fromYamlArray)) -}}
{{- if and $v.fsGroup (ne $v.state.volume "emptyDir") (not (dig "fsGroup" "" ($pod.securityContext | default dict))) -}}
{{- $_ := set $pod "securityContext" (merge (dict "fsGroup" (int64 $v.fsGroup) "fsGroupChangePolicy" "OnRootMismatch") ($pod.securityContext | default dict)) -}}
{{- end -}}
{{- end }}
