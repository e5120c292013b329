{{/* What the sidecar may do: nothing that the level `restricted` of Pod Security would refuse. */}}
{{- define "killswitch.securityContext" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- with .Values.killswitch.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "killswitch.resources" -}}
{{- $v := .Values.killswitch -}}
{{- if $v.guaranteed -}}
{{- $same := merge (deepCopy ($v.resources.limits | default dict)) ($v.resources.requests | default dict) -}}
{{- if not (dig "limits" "cpu" "" $v.resources) -}}
{{- fail "killswitch: killswitch.guaranteed needs killswitch.resources.limits.cpu, and enough of it: a limit as low as the request throttles the gate" -}}
{{- end -}}
{{- toYaml (dict "limits" $same "requests" $same) -}}
{{- else -}}
{{- toYaml $v.resources -}}
{{- end -}}
{{- end }}

{{/* Where a probe asks. The kubelet verifies no certificate and has none itself. */}}
{{- define "killswitch.probe" -}}
{{- if include "killswitch.healthIsApart" . -}}
port: killswitch-live
{{- else -}}
port: killswitch-ops{{ if eq (include "killswitch.scheme" .) "https" }}, scheme: HTTPS{{ end }}
{{- end -}}
{{- end }}

{{/*
The sidecar as one item of a list of containers, and the proxy as another where there is one. Arguments: the root, and where it stands ("native" or "container").

Its probes come from the kubelet to the pod's address, so they go to the operations port: the gate is on loopback. The sidecar
opens that port after the gate, which denies from its first moment on, so a first answer means that the gate listens and denies.
*/}}
{{- define "killswitch.sidecar" -}}
{{- $root := index . 0 -}}
{{- $placement := index . 1 -}}
{{- $v := $root.Values.killswitch -}}
- name: killswitch
  image: {{ include "killswitch.image" $root | quote }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  {{- if eq $placement "native" }}
  restartPolicy: Always
  command: [killswitch, serve]
  {{- else }}
  # All containers get SIGTERM at once: the gate waits for the bot to flatten.
  command: [killswitch, serve, --linger, {{ printf "%ds" (int $v.lingerSeconds) }}]
  {{- end }}
  env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    - name: POD_NAMESPACE
      valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
    - name: NODE_NAME
      valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    - name: POD_UID
      valueFrom: {fieldRef: {fieldPath: metadata.uid}}
    - name: POD_IP
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    - name: KILLSWITCH_CONFIG
      value: /etc/killswitch/config/config.yaml
    - name: KILLSWITCH_SELECTOR
      value: {{ $v.selector | quote }}
    {{- with $v.approvalCode }}
    {{- if .secretName }}
    - name: KILL_SWITCH_APPROVAL_CODE
      valueFrom: {secretKeyRef: {name: {{ .secretName }}, key: {{ .key }}}}
    {{- end }}
    {{- end }}
    {{- with $v.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {name: killswitch-ops, containerPort: {{ int $v.operations.port }}, protocol: TCP}
    {{- if include "killswitch.healthIsApart" $root }}
    - {name: killswitch-live, containerPort: {{ int $v.webConfig.healthPort }}, protocol: TCP}
    {{- end }}
  startupProbe:
    httpGet: {path: /-/healthy, {{ include "killswitch.probe" $root }}}
    {{- toYaml $v.startupProbe | nindent 4 }}
  livenessProbe:
    httpGet: {path: /-/healthy, {{ include "killswitch.probe" $root }}}
    # A sidecar that hangs must not linger: it cannot be asked anything.
    terminationGracePeriodSeconds: 5
    {{- toYaml $v.livenessProbe | nindent 4 }}
  readinessProbe:
    httpGet: {path: /-/ready, {{ include "killswitch.probe" $root }}}
    {{- toYaml $v.readinessProbe | nindent 4 }}
  resources:
    {{- include "killswitch.resources" $root | nindent 4 }}
  securityContext:
    {{- include "killswitch.securityContext" $root | nindent 4 }}
  volumeMounts:
    - {name: killswitch-config, mountPath: /etc/killswitch/config, readOnly: true}
    - {name: killswitch-rules, mountPath: /etc/killswitch/rules, readOnly: true}
    {{- if $v.approvers.secretName }}
    - {name: killswitch-approvers, mountPath: /etc/killswitch/approvers, readOnly: true}
    {{- end }}
    {{- if $v.tokens.secretName }}
    - {name: killswitch-tokens, mountPath: /etc/killswitch/tokens, readOnly: true}
    {{- end }}
    {{- if $v.webhookToken.secretName }}
    - {name: killswitch-webhook, mountPath: /etc/killswitch/webhook, readOnly: true}
    {{- end }}
    {{- if $v.webConfig.secretName }}
    - {name: killswitch-web, mountPath: /etc/killswitch/web, readOnly: true}
    {{- end }}
    - {name: killswitch-run, mountPath: /run/killswitch}
    - {name: killswitch-control, mountPath: /run/killswitch-control}
    - {name: killswitch-state, mountPath: /var/lib/killswitch}
    {{- with $v.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- if include "killswitch.hasProxy" $root }}
{{ include "killswitch.proxy" (list $root $placement) }}
{{- end }}
{{- end }}

{{/* For a list `initContainers`: the sidecar where it is a native one, else nothing. */}}
{{- define "killswitch.initContainer" -}}
{{- include "killswitch.checkValues" . -}}
{{- if and .Values.killswitch.enabled (eq (include "killswitch.placement" .) "native") -}}
{{- include "killswitch.sidecar" (list . "native") -}}
{{- end -}}
{{- end }}

{{/* For a list `containers`: the sidecar where it is a plain container, else nothing. */}}
{{- define "killswitch.container" -}}
{{- include "killswitch.checkValues" . -}}
{{- if and .Values.killswitch.enabled (eq (include "killswitch.placement" .) "container") -}}
{{- include "killswitch.sidecar" (list . "container") -}}
{{- end -}}
{{- end }}

{{/* For a list `volumes`. The state of a volumeClaimTemplate is not among them: see killswitch.volumeClaimTemplate. */}}
{{- define "killswitch.volumes" -}}
{{- include "killswitch.checkValues" . -}}
{{- $v := .Values.killswitch -}}
{{- if $v.enabled -}}
- name: killswitch-config
  configMap: {name: {{ include "killswitch.configMapName" . }}}
- name: killswitch-rules
  configMap: {name: {{ include "killswitch.rulesConfigMapName" . }}}
{{- range $volume, $kind := dict "approvers" "approvers" "tokens" "tokens" "webhook" "webhookToken" }}
{{- with index $v $kind }}
{{- if .secretName }}
- name: killswitch-{{ $volume }}
  secret:
    secretName: {{ .secretName }}
    items: [{key: {{ .key }}, path: {{ .key }}}]
{{- end }}
{{- end }}
{{- end }}
{{- with $v.webConfig }}
{{- if .secretName }}
- name: killswitch-web
  projected:
    sources:
      - secret: {name: {{ .secretName }}}
      {{- if .certificateSecretName }}
      - secret: {name: {{ .certificateSecretName }}}
      {{- end }}
{{- end }}
{{- end }}
# Shared with the trading container: the gate's socket and the state page.
- name: killswitch-run
  emptyDir: {medium: Memory, sizeLimit: {{ $v.run.sizeLimit }}}
# The sidecar's alone: whoever reaches the control socket owns the switch.
- name: killswitch-control
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- if eq $v.state.volume "emptyDir" }}
- name: killswitch-state
  emptyDir: {sizeLimit: {{ $v.state.size }}}
{{- else if eq $v.state.volume "persistentVolumeClaim" }}
- name: killswitch-state
  persistentVolumeClaim: {claimName: {{ include "killswitch.claimName" . }}}
{{- end }}
{{- if include "killswitch.hasProxy" . }}
{{ include "killswitch.proxyVolumes" . }}
{{- end }}
{{- with $v.extraVolumes }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}
{{- end }}

{{/* For the `volumeMounts` of a trading container: the run folder, and never the control folder. */}}
{{- define "killswitch.volumeMount" -}}
{{- if .Values.killswitch.enabled -}}
- {name: killswitch-run, mountPath: /run/killswitch, readOnly: true}
{{- end -}}
{{- end }}

{{/* For the labels of a pod: what `kubectl killswitch`, monitors and policies select by. */}}
{{- define "killswitch.podLabels" -}}
{{- if .Values.killswitch.enabled -}}
killswitch.io/guarded: "true"
killswitch.io/instance: {{ include "killswitch.fullname" . | quote }}
{{- end -}}
{{- end }}

{{/*
What Service, PodMonitor and NetworkPolicy select: the guarded pods of this chart in this release, so that nothing is done
twice where several releases share a namespace. All guarded pods for a root with watchesAll, of a chart that guards none.
*/}}
{{- define "killswitch.selectorLabels" -}}
killswitch.io/guarded: "true"
{{- if not .watchesAll }}
killswitch.io/instance: {{ include "killswitch.fullname" . | quote }}
{{- end }}
{{- end }}

{{/* For the annotations of a pod. */}}
{{- define "killswitch.podAnnotations" -}}
{{- $v := .Values.killswitch -}}
{{- if and $v.enabled $v.istio.excludePorts -}}
traffic.sidecar.istio.io/excludeInboundPorts: {{ join "," (prepend (ternary (list (int $v.webConfig.healthPort)) list (eq (include "killswitch.healthIsApart" .) "true")) (int $v.operations.port)) | quote }}
{{- end -}}
{{- end }}

{{- define "killswitch.claimSpec" -}}
{{- $state := .Values.killswitch.state -}}
accessModes: [{{ $state.accessMode }}]
{{- with $state.storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ $state.size }}}}
{{- end }}

{{/* For a list `volumeClaimTemplates` of a StatefulSet. */}}
{{- define "killswitch.volumeClaimTemplate" -}}
{{- if and .Values.killswitch.enabled (eq .Values.killswitch.state.volume "volumeClaimTemplate") -}}
- metadata: {name: killswitch-state}
  spec:
    {{- include "killswitch.claimSpec" . | nindent 4 }}
{{- end -}}
{{- end }}
