{{/* The sidecar's configuration as a YAML text: what the pod needs, and over it what `config` says. */}}
{{- define "killswitch.settings" -}}
{{- $v := .Values.killswitch -}}
{{- $own := dict
  "switch" dict
  "rules" (dict "files" (list "/etc/killswitch/rules/*.yaml"))
  "operations" (dict "listen" (printf "0.0.0.0:%d" (int $v.operations.port)))
  "alertmanager" (dict "notify" (dict "urls" list))
-}}
{{- if $v.approvers.secretName -}}
{{- $_ := set $own "recovery" (dict "approvers_file" (printf "/etc/killswitch/approvers/%s" $v.approvers.key)) -}}
{{- end -}}
{{- if $v.tokens.secretName -}}
{{- $_ := set $own.operations "tokens_file" (printf "/etc/killswitch/tokens/%s" $v.tokens.key) -}}
{{- end -}}
{{- if $v.webConfig.secretName -}}
{{- $_ := set $own.operations "web_config" "/etc/killswitch/web/web.yaml" -}}
{{- end -}}
{{- if include "killswitch.healthIsApart" . -}}
{{- $_ := set $own.operations "health_listen" (printf "0.0.0.0:%d" (int $v.webConfig.healthPort)) -}}
{{- end -}}
{{- if $v.webhookToken.secretName -}}
{{- $_ := set $own.alertmanager "webhook" (dict "token_file" (printf "/etc/killswitch/webhook/%s" $v.webhookToken.key)) -}}
{{- end -}}
{{- $all := mergeOverwrite $own (deepCopy $v.config) -}}
{{- $_ := set $all.switch "name" (include "killswitch.switchName" .) -}}
{{- if $v.service.enabled -}}
{{- $host := include "killswitch.serviceName" . -}}
{{- $hosts := list $host (printf "%s.%s" $host .Release.Namespace) (printf "%s.%s.svc" $host .Release.Namespace) -}}
{{- $_ := set $all.operations "hosts" (concat ($all.operations.hosts | default list) $hosts | uniq) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{- define "killswitch.switchName" -}}
{{- tpl (dig "switch" "name" "${POD_NAMESPACE}/${POD_NAME}" .Values.killswitch.config) . -}}
{{- end }}

{{/* The rule files as a YAML mapping. A file set to null is left out: so a chart's values can be taken back. */}}
{{- define "killswitch.rules" -}}
{{- $files := dict -}}
{{- range $file, $content := .Values.killswitch.rules -}}
{{- if not (kindIs "invalid" $content) -}}{{- $_ := set $files $file $content -}}{{- end -}}
{{- end -}}
{{- toYaml $files -}}
{{- end }}

{{/* ConfigMaps with the configuration and the rules. A change of them restarts nothing: the sidecar sees it by itself. */}}
{{- define "killswitch.config" -}}
{{- include "killswitch.checkValues" . -}}
{{- $v := .Values.killswitch -}}
{{- if not $v.existingConfigMap }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "killswitch.configMapName" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "killswitch.labels" . | nindent 4 }}
data:
  config.yaml: |
    {{- include "killswitch.settings" . | nindent 4 }}
{{- end }}
{{- if not $v.existingRulesConfigMap }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "killswitch.rulesConfigMapName" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "killswitch.labels" . | nindent 4 }}
data:
  {{- if $v.defaultRules }}
  {{- if hasKey $v.rules "default.yaml" }}{{ fail "killswitch: killswitch.rules has a file default.yaml of its own; set killswitch.defaultRules: false" }}{{ end }}
  default.yaml: |
    {{- include "killswitch.defaultRules" . | trim | nindent 4 }}
  {{- end }}
  {{- range $file, $content := include "killswitch.rules" . | fromYaml }}
  {{ $file }}: |
    {{- if kindIs "string" $content }}
    {{- $content | trim | nindent 4 }}
    {{- else }}
    {{- toYaml $content | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
